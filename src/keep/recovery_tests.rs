//! The verdict as a table.

// What is wrong with a verdict is shown whole.
#![allow(clippy::result_large_err)]

use super::*;
use crate::relay::CloseReason;

fn counts(state: TcpState, read: u64, written: u64) -> TcpCounts {
    let fin = |is: bool| u64::from(is);
    TcpCounts {
        state,
        has_error: false,
        received: read + fin(state.has_peers_fin()),
        acked: written + fin(state.has_our_fin()),
        unread: 0,
        unacked: 0,
        handed_over: 0,
    }
}

/// The server's socket: we connected it.
fn connected(state: TcpState, read: u64, written: u64) -> TcpCounts {
    let syn = u64::from(state != TcpState::SynSent);
    let plain = counts(state, read, written);
    TcpCounts { acked: plain.acked + syn, ..plain }
}

fn slot(state: State) -> Slot {
    Slot { state, client: Some(5), server: Some(6), place: Some(0), ..Slot::default() }
}

fn judge(slot: &Slot, counts: [Option<TcpCounts>; 2], claims: [Claims; 2]) -> Verdict {
    recover(&Sight { slot, service: None, counts, claims })
}

const NONE: [Claims; 2] = [Claims { scratch: None, chunk: None, pipe: None }; 2];

fn up(claims: Claims) -> [Claims; 2] {
    [claims, Claims::default()]
}

use TcpState::{Close, CloseWait, Established, FinWait2, SynSent};

#[test]
fn what_has_begun_goes_on_where_it_was() {
    let idle = counts(Established, 0, 0);
    let with = |slot: &Slot, client, server| judge(slot, [Some(client), server], NONE);
    let bare = |state| Slot { server: None, ..slot(state) };
    assert_eq!(with(&bare(State::Accepted), idle, None), Verdict::Enter { header_read: false });
    assert_eq!(with(&bare(State::Header), idle, None), Verdict::AwaitHeader);
    let announced = Slot { header: 20, ..bare(State::Header) };
    assert_eq!(with(&announced, idle, None), Verdict::AwaitHeader, "announced and not read");
    let read = counts(Established, 20, 0);
    assert_eq!(with(&announced, read, None), Verdict::Enter { header_read: true });
    let lost = Verdict::End { lost: Some(Side::Client), owed: None };
    assert_eq!(with(&announced, TcpCounts { has_error: true, ..counts(Close, 20, 0) }, None), lost);
    let other = counts(Established, 19, 0);
    assert_eq!(with(&announced, other, None), Verdict::Reset(Failure::Disagreement));
    for state in [State::Connecting, State::Queued] {
        assert_eq!(with(&bare(state), idle, None), Verdict::Connect);
    }
    let connecting = slot(State::Connecting);
    for state in [SynSent, Established, CloseWait] {
        assert_eq!(with(&connecting, idle, Some(connected(state, 0, 0))), Verdict::Connecting, "{state:?}");
    }
    let refused = TcpCounts { has_error: true, ..connected(Close, 0, 0) };
    assert_eq!(with(&connecting, idle, Some(refused)), Verdict::Connecting, "the next one is tried");
    let forgotten = connected(Close, 0, 0);
    assert_eq!(with(&connecting, idle, Some(forgotten)), Verdict::Connect, "the error was read already");
    assert_eq!(with(&bare(State::Closing), idle, None), Verdict::End { lost: None, owed: None });
}

/// What the first direction holds, if the session goes on.
fn held(verdict: Verdict) -> Result<Held, Verdict> {
    match verdict {
        Verdict::Open([up, _]) => Ok(up.held),
        other => Err(other),
    }
}

fn chunk(base: u64, length: usize) -> Option<(u32, Chunk)> {
    let words = [1 | (length as u64) << 34, base];
    Some((9, Chunk::of_words(words)))
}

#[test]
fn what_is_owed_has_to_lie_where_it_is_said_to_lie() {
    let open = slot(State::Open);
    let judge = |read, written, claims| {
        let both = [counts(Established, read, 0), connected(Established, 0, written)].map(Some);
        held(judge(&open, both, up(claims)))
    };
    let nothing = Claims::default();
    let disagreement = Err(Verdict::Reset(Failure::Disagreement));
    assert_eq!(judge(100, 100, nothing), Ok(Held::default()));
    assert_eq!(judge(100, 90, nothing), disagreement, "owed, and nowhere");
    assert_eq!(judge(90, 100, nothing), disagreement, "more written than read");
    let scratch = |base| Claims { scratch: Some(base), ..nothing };
    assert_eq!(judge(100, 70, scratch(70)), Ok(Held { scratch: 0..30, ..Held::default() }));
    assert_eq!(judge(100, 70, scratch(60)), Ok(Held { scratch: 10..40, ..Held::default() }));
    assert_eq!(judge(100, 70, scratch(71)), disagreement);
    assert_eq!(judge(1 << 20, 70, scratch(70)), disagreement, "longer than the scratch");
    assert_eq!(judge(100, 100, scratch(70)), Ok(Held::default()), "all of it is out");
    let chunked = |base, length| Claims { chunk: chunk(base, length), ..nothing };
    let of_chunk = |range| Ok(Held { chunk: Some((9, range)), ..Held::default() });
    assert_eq!(judge(100, 70, chunked(60, 40)), of_chunk(10..40));
    assert_eq!(judge(100, 70, chunked(60, 41)), disagreement, "it ends elsewhere");
    assert_eq!(judge(100, 70, chunked(71, 29)), disagreement, "it begins behind");
    let both = Claims { scratch: Some(50), ..chunked(60, 40) };
    assert_eq!(judge(100, 70, both), of_chunk(10..40), "moved from the scratch, which still says so");
    let piped = |pipe, rest| Claims { pipe: Some(pipe), ..rest };
    assert_eq!(judge(100, 70, piped(30, nothing)), Ok(Held { piped: 30, ..Held::default() }));
    assert_eq!(judge(100, 70, piped(29, nothing)), disagreement);
    assert_eq!(judge(100, 100, piped(1, nothing)), disagreement, "nobody owes what is in the pipe");
    let moving = Ok(Held { chunk: Some((9, 0..20)), piped: 10, ..Held::default() });
    assert_eq!(judge(100, 70, piped(10, chunked(70, 30))), moving, "half way out of the pipe");
    assert_eq!(judge(100, 70, piped(10, chunked(60, 40))), disagreement);
}

#[test]
fn bytes_that_are_ours_and_bytes_that_are_nobodys_are_not_the_clients() {
    let open = Slot { header: 20, preface: 50, ..slot(State::Open) };
    let both = [counts(Established, 120, 7), connected(Established, 7, 150)].map(Some);
    let Verdict::Open([up, down]) = judge(&open, both, NONE) else { panic!("it goes on") };
    assert_eq!((up.received, up.sent), (100, 150));
    assert_eq!((down.received, down.sent), (7, 7));
    let early = [counts(Established, 19, 0), connected(Established, 0, 0)].map(Some);
    assert_eq!(judge(&open, early, NONE), Verdict::Reset(Failure::Disagreement));
}

#[test]
fn an_end_is_passed_on_once_and_a_reset_is_none() {
    let open = slot(State::Open);
    let finished = Slot { finished: [true, false], ..open };
    let with = |slot: &Slot, client, server| judge(slot, [Some(client), Some(server)], NONE);
    let Verdict::Open([up, down]) = with(&finished, counts(CloseWait, 9, 3), connected(FinWait2, 3, 9))
    else {
        panic!("half-closed")
    };
    assert!(up.has_ended && !down.has_ended);
    // Marked, and killed before it was passed on.
    let Verdict::Open([up, _]) = with(&finished, counts(CloseWait, 9, 3), connected(Established, 3, 9))
    else {
        panic!("half-closed")
    };
    assert!(!up.has_ended);
    // The server's side is over in an orderly way; its end is still to be read.
    let over = with(&finished, counts(CloseWait, 9, 3), connected(Close, 3, 9));
    assert!(matches!(over, Verdict::Open(_)), "{over:?}");
    // Closed, and we never passed an end on: a reset, whose error was read.
    let lost = Verdict::End { lost: Some(Side::Server), owed: None };
    assert_eq!(with(&open, counts(Established, 9, 3), connected(Close, 3, 9)), lost);
    // Whose error waits, somebody else can read.
    let pending = TcpCounts { has_error: true, ..connected(Close, 3, 9) };
    assert!(matches!(with(&open, counts(Established, 9, 3), pending), Verdict::Open(_)));
    // But not where its end was read before: nobody reads there again.
    let pending = TcpCounts { has_error: true, ..counts(Close, 9, 3) };
    let lost_client = Verdict::End { lost: Some(Side::Client), owed: None };
    assert_eq!(with(&finished, pending, connected(FinWait2, 3, 9)), lost_client);
    // And a reset has thrown away what was on its way: what is owed then agrees
    // with nothing, which is not the worker's fault.
    let both = Slot { finished: [true, true], ..open };
    let over = with(&both, counts(Close, 9, 3), connected(Close, 3, 8));
    assert_eq!(over, Verdict::Reset(Failure::Lost(Side::Client)));
    let broken = Slot { reason: Some(CloseReason::ServerReset), ..open };
    assert_eq!(with(&broken, counts(Established, 9, 3), connected(Close, 3, 9)), lost);
}

#[test]
fn where_nobody_counts_the_worker_is_believed_unless_it_was_in_a_call() {
    let open = Slot { is_unix: true, ..slot(State::Open) };
    let judge = |read, claims| held(judge(&open, [Some(counts(Established, read, 0)), None], up(claims)));
    let uncertain = Err(Verdict::Reset(Failure::Uncertain));
    let nothing = Claims::default();
    assert_eq!(judge(100, nothing), Ok(Held::default()));
    let chunked = Claims { chunk: chunk(60, 40), ..nothing };
    assert_eq!(judge(100, chunked), Ok(Held { chunk: Some((9, 0..40)), ..Held::default() }));
    assert_eq!(judge(100, Claims { scratch: Some(SENDING), ..chunked }), uncertain);
    assert_eq!(judge(101, chunked), Err(Verdict::Reset(Failure::Disagreement)));
    assert_eq!(judge(100, Claims { scratch: Some(100), ..nothing }), Ok(Held::default()), "not read yet");
    assert_eq!(judge(101, Claims { scratch: Some(100), ..nothing }), uncertain);
    assert_eq!(judge(100, Claims { pipe: Some(30), ..nothing }), Ok(Held { piped: 30, ..Held::default() }));
}
