//! The sessions by listener and server, counted anew.

use super::Sessions;
use crate::worker::census::Census;

impl Sessions<'_> {
    /// How many there are.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for entry in self.slab.keys().into_iter().filter_map(|key| self.slab.get(key)) {
            census.note(entry.listener as usize, self.server_number(entry));
        }
        census
    }
}
