//! The flows by listener and server, counted anew.

use super::Datagrams;
use crate::worker::census::Census;

impl Datagrams<'_> {
    /// How many there are.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for flow in self.flows.keys().into_iter().filter_map(|key| self.flows.get(key)) {
            let listener = usize::from(flow.key().listener);
            census.note(listener, self.server_number(listener, flow.server));
        }
        census
    }
}
