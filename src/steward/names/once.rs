//! Names resolved once, for `evenkeel check`: which of them do not.
//!
//! Beside each other, and bounded as a whole: a check of a configuration must
//! not hang on a DNS server. Nothing is bound and nothing stays.

use std::rc::Rc;
use std::time::Duration;

use super::lookup::Lookups;
use crate::config::ServerAddress;

/// Of these addresses those that do not resolve within `limit`, by their
/// number, and why.
pub fn unresolved(addresses: &[ServerAddress], limit: Duration) -> Vec<(usize, String)> {
    let named =
        |address: &&ServerAddress| matches!(address, ServerAddress::Name { .. } | ServerAddress::Srv(_));
    if !addresses.iter().any(|address| named(&address)) {
        return Vec::new();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return Vec::new() };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let lookups = match Lookups::new() {
            Ok(lookups) => Rc::new(lookups),
            Err(reason) => return vec![(0, reason)],
        };
        let mut tasks = Vec::new();
        for (number, address) in addresses.iter().enumerate().filter(|(_, address)| named(address)) {
            let (lookups, address) = (Rc::clone(&lookups), address.clone());
            let asked = async move { tokio::time::timeout(limit, lookups.resolve(&address)).await };
            tasks.push((number, tokio::task::spawn_local(asked)));
        }
        let mut missing = Vec::new();
        for (number, task) in tasks {
            let late = || format!("no answer within {}", crate::units::format_duration(limit));
            match task.await {
                Ok(Ok(Ok(_))) => {}
                Ok(Ok(Err(reason))) => missing.push((number, reason)),
                Ok(Err(_)) | Err(_) => missing.push((number, late())),
            }
        }
        missing
    })
}
