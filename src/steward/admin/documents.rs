//! The documents that callers get, made at most a few times a second.
//!
//! One snapshot of the daemon serves every caller for `FRESH`; page, metrics
//! and document of one moment agree. However many callers there are, the work
//! is that of four a second, and a slow reader holds a reference and no copy.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use tokio::sync::Mutex;

use super::metrics::{self, Format};
use crate::control::status::Status;
use crate::steward::{Knowledge, report};

/// How old a snapshot may be.
const FRESH: Duration = Duration::from_millis(250);

/// All documents.
#[derive(Debug)]
pub struct Documents {
    knowledge: Arc<Knowledge>,
    last: Mutex<Option<Arc<Snapshot>>>,
}

/// The daemon at one moment.
#[derive(Debug)]
pub struct Snapshot {
    made: Instant,
    status: Status,
    json: OnceLock<Bytes>,
    openmetrics: OnceLock<Bytes>,
    prometheus: OnceLock<Bytes>,
}

impl Documents {
    /// Documents about what the steward knows.
    pub fn new(knowledge: Arc<Knowledge>) -> Documents {
        Documents { knowledge, last: Mutex::const_new(None) }
    }

    /// The daemon now; `None` where that could not be found out.
    pub async fn snapshot(&self) -> Option<Arc<Snapshot>> {
        // Whoever comes meanwhile waits here, and gets the same.
        let mut last = self.last.lock().await;
        if let Some(snapshot) = last.as_ref().filter(|snapshot| snapshot.made.elapsed() < FRESH) {
            return Some(Arc::clone(snapshot));
        }
        let knowledge = Arc::clone(&self.knowledge);
        let snapshot = tokio::task::spawn_blocking(move || Snapshot::new(report::status(&knowledge)));
        *last = snapshot.await.ok().map(Arc::new);
        last.clone()
    }

    /// Why nobody should be sent here, if so.
    pub fn unhealthy(&self) -> Option<String> {
        report::unhealthy(&self.knowledge)
    }
}

impl Snapshot {
    /// Documents about this.
    pub fn new(status: Status) -> Snapshot {
        let (json, openmetrics, prometheus) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Snapshot { made: Instant::now(), status, json, openmetrics, prometheus }
    }

    /// `/status.json`
    pub fn json(&self) -> Bytes {
        let make = || serde_json::to_vec(&self.status).expect("a status is plain data").into();
        self.json.get_or_init(make).clone()
    }

    /// `/metrics`
    pub fn metrics(&self, format: Format) -> Bytes {
        let place = match format {
            Format::OpenMetrics => &self.openmetrics,
            Format::Prometheus => &self.prometheus,
        };
        place.get_or_init(|| metrics::text(&self.status, format).into()).clone()
    }
}
