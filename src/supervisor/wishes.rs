//! What is asked of the daemon, by signals and by the control socket.

use std::process::ExitCode;

use nix::sys::signal::Signal;
use tracing::{error, info, warn};

use super::slot::Slot;
use super::{Refusal, Supervisor, access_log};
use crate::control::{Request, ToSteward};

impl Supervisor {
    pub(super) fn handle_signals(&mut self) -> Result<(), Refusal> {
        while let Some(signal) = self.signals.next() {
            match signal {
                Signal::SIGCHLD => self.reap()?,
                Signal::SIGTERM | Signal::SIGINT => {
                    let limit = self.generation.config.daemon.drain_timeout;
                    self.handle_leave(Some(limit.as_millis() as u64), signal == Signal::SIGTERM)?;
                }
                Signal::SIGQUIT => self.handle_leave(None, false)?,
                Signal::SIGHUP => {
                    self.notify_reloading();
                    if let Err(refusal) = self.reload_file(None, false) {
                        error!("not reloaded: {}", refusal.text);
                        self.seen.note_reload(false, &refusal.text);
                        self.finish_reload_notice();
                    }
                }
                Signal::SIGUSR2 => {
                    self.notify_reloading();
                    if let Err(refusal) = self.upgrade(None) {
                        error!("not upgraded: {}", refusal.text);
                        self.finish_reload_notice();
                    }
                }
                Signal::SIGUSR1 => self.reopen_logs(),
                other => warn!("{other} does nothing yet"),
            }
        }
        Ok(())
    }

    /// Whoever rotated the access log has renamed it before.
    pub(super) fn reopen_logs(&mut self) {
        match access_log::open(&self.generation.config) {
            Ok(file) => {
                self.prepared.access_log.set_file(file);
                self.tell_of_access_log();
                info!("log files opened anew");
            }
            Err(refusal) => error!("{}; the old one is written on", refusal.text),
        }
    }

    pub(super) fn tell_of_access_log(&mut self) {
        self.steward.send(&ToSteward::AccessLog, &self.prepared.access_log.of_steward());
    }

    pub(super) fn handle_request(&mut self, id: u64, request: Request) {
        let now = match request {
            Request::Drain if self.leave.is_some() => Ok(Some(String::new())),
            Request::Drain => {
                let limit = self.generation.config.daemon.drain_timeout;
                self.handle_leave(Some(limit.as_millis() as u64), false).map(|()| Some(String::new()))
            }
            Request::Stop => {
                info!("stopped by the control socket");
                self.end = Some(ExitCode::SUCCESS);
                self.slots.iter_mut().chain(&mut self.retiring).for_each(Slot::kill);
                Ok(Some(String::new()))
            }
            Request::Reload { dry_run: true } => self.reload_file(Some(id), true),
            Request::Reload { dry_run: false } => {
                self.notify_reloading();
                self.reload_file(Some(id), false).inspect_err(|refusal| {
                    self.seen.note_reload(false, &refusal.text);
                    self.finish_reload_notice();
                })
            }
            Request::Scale(count) => self.scale(count, id).map(|()| None),
            Request::Rebalance => self.rebalance(id).map(|()| None),
            Request::NoteJob(job) => {
                self.noted_job = Some(job);
                Ok(Some(String::new()))
            }
            Request::Upgrade => {
                self.notify_reloading();
                self.upgrade(Some(id)).map(|()| None).inspect_err(|_| self.finish_reload_notice())
            }
            Request::Sessions(query) => {
                self.ask_workers(id, &query).map(|()| None).map_err(|text| Refusal::new(1, text, ""))
            }
            Request::Server { upstream, server, change } => {
                let config = &self.generation.config;
                let changed = self.overrides.handle_change(config, &upstream, &server, change);
                self.overrides_changed = true;
                changed
                    .map(|text| {
                        info!("{text}");
                        Some(text)
                    })
                    .map_err(|text| Refusal::new(1, text, ""))
            }
        };
        match now {
            // The answer comes when it is done.
            Ok(None) => {}
            Ok(Some(text)) => self.answer(Some(id), Ok(text)),
            Err(refusal) => {
                let advice =
                    if refusal.advice.is_empty() { String::new() } else { format!("\n  {}", refusal.advice) };
                self.answer(Some(id), Err(format!("{}{advice}", refusal.text)));
            }
        }
    }

    pub(super) fn answer(&mut self, requester: Option<u64>, answer: Result<String, String>) {
        if let Some(id) = requester {
            // Whoever asks for the status next sees what was changed.
            self.tell_steward();
            self.steward.send(&ToSteward::Answer { id, answer }, &[]);
        }
    }

    /// systemd(1): the reload ends with the next READY=1.
    pub(super) fn notify_reloading(&self) {
        self.notify.begin_reload();
    }

    pub(super) fn finish_reload_notice(&self) {
        self.notify.end_reload();
    }
}
