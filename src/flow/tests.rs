//! The flow table against simple models.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn limits(max_flows: u32, replies: u32) -> Limits {
    Limits { idle_timeout: 1_000, replies, max_flows, has_sockets: true }
}

fn flows(max_flows: u32, replies: u32) -> Flows {
    Flows::new(vec![limits(max_flows, replies)], 1_000_000, 1, 0)
}

fn name(client: u16) -> FlowKey {
    let client = SocketAddr::from(([192, 0, 2, 1], client));
    FlowKey { client, local: IpAddr::from([127, 0, 0, 1]), listener: 0, address: 0 }
}

fn open(flows: &mut Flows, client: u16, now: u64) -> Key {
    assert_eq!(flows.handle_client(&name(client), now), Arrival::Open { evict: None });
    flows.open(name(client), 0, now)
}

#[test]
fn a_client_at_another_local_address_is_another_flow() {
    let mut flows = flows(10, 0);
    let key = open(&mut flows, 1, 0);
    assert_eq!(flows.handle_client(&name(1), 1), Arrival::Known(key));
    let other = FlowKey { local: IpAddr::from([127, 0, 0, 2]), ..name(1) };
    assert_eq!(flows.handle_client(&other, 1), Arrival::Open { evict: None });
    let other = FlowKey { address: 1, ..name(1) };
    assert_eq!(flows.handle_client(&other, 1), Arrival::Open { evict: None });
}

#[test]
fn past_the_limit_the_oldest_unanswered_goes_and_answered_ones_stay() {
    let mut flows = flows(3, 0);
    let answered = open(&mut flows, 1, 0);
    let oldest = open(&mut flows, 2, 1);
    let younger = open(&mut flows, 3, 2);
    assert_eq!(flows.handle_reply(answered, 3), Reply::Pass);
    assert_eq!(flows.handle_client(&name(4), 4), Arrival::Open { evict: Some(oldest) });
    flows.end(oldest);
    flows.open(name(4), 0, 4);
    assert_eq!(flows.handle_client(&name(5), 5), Arrival::Open { evict: Some(younger) });
    assert_eq!(flows.handle_reply(younger, 5), Reply::Pass);
    let fourth = flows.find(&name(4)).unwrap();
    assert_eq!(flows.handle_reply(fourth, 5), Reply::Pass);
    assert_eq!(flows.handle_client(&name(5), 6), Arrival::Drop(DropReason::Shed));
    assert_eq!(flows.handle_client(&name(1), 6), Arrival::Known(answered));
}

#[test]
fn the_bound_in_all_is_shared_by_listeners_with_sockets() {
    let service = Limits { has_sockets: false, ..limits(10, 0) };
    let mut flows = Flows::new(vec![limits(10, 0), limits(10, 0), service], 2, 1, 0);
    let at = |listener, client| FlowKey { listener, ..name(client) };
    let first = flows.open(at(1, 1), 0, 0);
    flows.open(at(0, 2), 0, 1);
    flows.open(at(2, 3), NO_SERVER, 1);
    assert_eq!(flows.handle_client(&at(0, 4), 2), Arrival::Open { evict: Some(first) });
    assert_eq!(flows.handle_client(&at(2, 4), 2), Arrival::Open { evict: None });
    assert_eq!((flows.socket_count(), flows.evictable()), (2, Some(first)));
}

#[test]
fn a_flow_ends_after_its_replies() {
    let mut flows = flows(10, 2);
    let key = open(&mut flows, 1, 0);
    assert_eq!(flows.handle_reply(key, 1), Reply::Pass);
    assert_eq!(flows.handle_reply(key, 1), Reply::Last);
    flows.end(key);
    assert_eq!(flows.handle_reply(key, 1), Reply::Drop);
}

#[test]
fn a_flow_does_not_end_before_each_question_has_a_reply() {
    let mut flows = flows(10, 1);
    let key = open(&mut flows, 1, 0);
    flows.handle_client(&name(1), 0);
    flows.handle_client(&name(1), 0);
    assert_eq!([0; 3].map(|_| flows.handle_reply(key, 1)), [Reply::Pass, Reply::Pass, Reply::Last]);
}

#[test]
fn a_flow_without_datagrams_expires_and_one_with_them_does_not() {
    let mut flows = flows(10, 0);
    let silent = open(&mut flows, 1, 0);
    let busy = open(&mut flows, 2, 0);
    let (mut due, mut fired) = (Vec::new(), Vec::new());
    flows.handle_client(&name(2), 900);
    flows.expire(1_020, &mut due, &mut fired);
    assert_eq!(due, [silent]);
    flows.end(silent);
    due.clear();
    flows.expire(1_850, &mut due, &mut fired);
    assert!(due.is_empty());
    flows.expire(1_940, &mut due, &mut fired);
    assert_eq!(due, [busy]);
}

#[test]
fn a_shorter_idle_timeout_holds_for_the_flows_that_there_are() {
    let mut flows = flows(10, 0);
    let silent = open(&mut flows, 1, 0);
    let busy = open(&mut flows, 2, 0);
    flows.handle_reply(busy, 500);
    flows.shorten_idle_timeout(200, 510);
    let (mut due, mut fired) = (Vec::new(), Vec::new());
    flows.expire(550, &mut due, &mut fired);
    assert_eq!(due, [silent]);
    due.clear();
    flows.expire(740, &mut due, &mut fired);
    assert_eq!(due, [busy]);
}

#[test]
fn a_failed_server_is_left_at_the_next_datagram() {
    let mut flows = flows(10, 0);
    let key = open(&mut flows, 1, 0);
    assert!(flows.handle_failure(key));
    assert!(!flows.handle_failure(key), "told once");
    assert_eq!(flows.handle_client(&name(1), 1), Arrival::Move(key));
    flows.handle_moved(key, 1);
    assert_eq!(flows.handle_client(&name(1), 1), Arrival::Known(key));
}

#[test]
fn replies_are_outstanding_while_questions_outnumber_them() {
    let mut flows = flows(10, 0);
    let key = open(&mut flows, 1, 0);
    flows.handle_client(&name(1), 0);
    flows.handle_reply(key, 0);
    assert!(flows.get(key).unwrap().has_replies_outstanding());
    flows.handle_reply(key, 0);
    assert!(!flows.get(key).unwrap().has_replies_outstanding());
    flows.handle_reply(key, 0);
    flows.handle_client(&name(1), 0);
    assert!(flows.get(key).unwrap().has_replies_outstanding(), "more replies than questions prove nothing");
}

#[test]
fn a_leaving_worker_keeps_its_flows_and_opens_none() {
    let mut flows = flows(10, 0);
    let key = open(&mut flows, 1, 0);
    flows.begin_leave();
    assert_eq!(flows.handle_client(&name(1), 1), Arrival::Known(key));
    assert_eq!(flows.handle_client(&name(2), 1), Arrival::Drop(DropReason::Leaving));
}

#[test]
fn a_flow_takes_little_memory() {
    // With 5 to 9 bytes in the index, 16 for its deadline and 8 for its socket.
    const { assert!(table::PLACE_BYTES <= 80) };
}

#[test]
fn every_drop_reason_stands_at_its_own_place() {
    for (index, reason) in DropReason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, index, "{}", reason.name());
    }
}

proptest! {
    /// A flood of new clients: those that were answered are never pushed out,
    /// the bound holds, and every name leads to its own flow.
    #[test]
    fn a_flood_harms_no_answered_flow(
        max in 1u32..40,
        steps in prop::collection::vec((0u16..80, 0u8..8), 1..600),
    ) {
        let mut flows = flows(max, 0);
        // Clients with their keys, in order of opening, and whether answered.
        let mut model: HashMap<u16, (Key, bool)> = HashMap::new();
        let mut order: Vec<u16> = Vec::new();
        for (now, (client, what)) in steps.into_iter().enumerate() {
            let now = now as u64;
            match (what, model.get(&client).copied()) {
                (0, Some((key, _))) => {
                    prop_assert_eq!(flows.handle_reply(key, now), Reply::Pass);
                    model.insert(client, (key, true));
                    order.retain(|other| *other != client);
                }
                (1, Some((key, _))) => {
                    prop_assert_eq!(flows.end(key).map(|flow| flow.key()), Some(name(client)));
                    prop_assert!(flows.end(key).is_none());
                    model.remove(&client);
                    order.retain(|other| *other != client);
                }
                (_, Some((key, _))) => {
                    prop_assert_eq!(flows.handle_client(&name(client), now), Arrival::Known(key));
                }
                (_, None) => match flows.handle_client(&name(client), now) {
                    Arrival::Open { evict } => {
                        let full = model.len() as u32 == max;
                        prop_assert_eq!(evict, full.then(|| model[&order[0]].0));
                        if let Some(key) = evict {
                            flows.end(key);
                            model.remove(&order.remove(0));
                        }
                        let key = flows.open(name(client), 0, now);
                        model.insert(client, (key, false));
                        order.push(client);
                    }
                    Arrival::Drop(reason) => {
                        prop_assert_eq!(reason, DropReason::Shed);
                        prop_assert!(order.is_empty() && model.len() as u32 == max);
                    }
                    other => prop_assert!(false, "{:?}", other),
                },
            }
            prop_assert_eq!(flows.len(), model.len());
        }
        for client in 0..80 {
            let known = model.get(&client).map(|(key, _)| *key);
            prop_assert_eq!(flows.find(&name(client)), known);
        }
    }
}
