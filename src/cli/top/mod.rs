//! `evenkeel top`: the status, live in the terminal.
//!
//! Two threads feed one channel: one asks the daemon each interval, one reads
//! the keyboard (which also tells of a resize). The main thread draws when
//! something came and sleeps otherwise. The terminal is given back however
//! this ends, a panic included (`ratatui::init` sees to that).

mod draw;
mod rows;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::json;

use crate::control::client;
use crate::control::status::Status;
use rows::{Pane, Table};

/// A daemon that has not answered for so long is shown as silent.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What wakes the main thread.
enum Event {
    Answer(Result<Box<Status>, String>, Instant),
    Key(KeyEvent),
    Resize,
    /// The keyboard is gone.
    End,
}

/// What is on the screen, and how it is looked at.
struct Top {
    socket: PathBuf,
    interval: Duration,
    /// The last two answers, for rates; the newer first.
    newer: Option<(Status, Instant)>,
    older: Option<(Status, Instant)>,
    /// Why there is no newer answer.
    silence: Option<String>,
    paused: bool,
    help: bool,
    focus: Pane,
    views: [View; 3],
}

/// How one pane is looked at.
#[derive(Clone, Copy, Debug, Default)]
struct View {
    /// The column that rows are sorted by; `None` = the daemon's own order.
    sort: Option<usize>,
    ascending: bool,
    /// The first row that is shown.
    offset: usize,
}

/// Runs until `q`.
pub fn run(socket: &Path, interval: Duration) -> ExitCode {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        eprintln!(
            "evenkeel: top needs a terminal\n  `evenkeel status` prints the same once, `evenkeel status --json` for programs"
        );
        return ExitCode::from(2);
    }
    // Before the screen is taken over: a mistyped socket is told as everywhere.
    let first = match ask(socket) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("evenkeel: {error}");
            return ExitCode::from(1);
        }
    };
    let (sender, events) = bounded(16);
    listen(&sender);
    poll(socket.to_path_buf(), interval, sender);
    let mut top = Top {
        socket: socket.to_path_buf(),
        interval,
        newer: Some((first, Instant::now())),
        older: None,
        silence: None,
        paused: false,
        help: false,
        focus: Pane::Listeners,
        views: [View::default(); 3],
    };
    let mut terminal = ratatui::init();
    let outcome = top.serve(&mut terminal, &events);
    ratatui::restore();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("evenkeel: the terminal: {error}");
            ExitCode::from(1)
        }
    }
}

fn ask(socket: &Path) -> Result<Status, String> {
    let mut answer = client::ask(socket, &json!({"command": "status"}), ANSWER_LIMIT)?;
    serde_json::from_value(answer["status"].take())
        .map_err(|error| format!("the daemon's answer is of another version: {error}"))
}

/// Both threads end with the process, or when the channel is closed.
fn listen(sender: &Sender<Event>) {
    let sender = sender.clone();
    thread::spawn(move || {
        loop {
            let event = match event::read() {
                Ok(event::Event::Key(key)) if key.kind != KeyEventKind::Release => Event::Key(key),
                Ok(event::Event::Resize(..)) => Event::Resize,
                Ok(_) => continue,
                Err(_) => Event::End,
            };
            let last = matches!(event, Event::End);
            if sender.send(event).is_err() || last {
                return;
            }
        }
    });
}

fn poll(socket: PathBuf, interval: Duration, sender: Sender<Event>) {
    thread::spawn(move || {
        loop {
            thread::sleep(interval);
            let answer = ask(&socket).map(Box::new);
            if sender.send(Event::Answer(answer, Instant::now())).is_err() {
                return;
            }
        }
    });
}

impl Top {
    fn serve(&mut self, terminal: &mut DefaultTerminal, events: &Receiver<Event>) -> io::Result<()> {
        loop {
            terminal.draw(|frame| draw::draw(self, frame))?;
            match events.recv() {
                Ok(Event::Answer(answer, at)) => self.handle_answer(answer, at),
                Ok(Event::Key(key)) => {
                    if self.handle_key(key) {
                        return Ok(());
                    }
                }
                Ok(Event::Resize) => {}
                Ok(Event::End) | Err(_) => return Ok(()),
            }
        }
    }

    fn handle_answer(&mut self, answer: Result<Box<Status>, String>, at: Instant) {
        match answer {
            // The first line is what is wrong, the rest what to do about a
            // start: too much for a title.
            Err(error) => self.silence = Some(error.lines().next().unwrap_or_default().to_string()),
            Ok(_) if self.paused => {}
            Ok(status) => {
                self.silence = None;
                // Rates over a restart would be nonsense.
                let same = self.newer.as_ref().is_some_and(|(newer, _)| newer.pid == status.pid);
                self.older = self.newer.take().filter(|_| same);
                self.newer = Some((*status, at));
            }
        }
    }

    /// True where it was the last key.
    fn handle_key(&mut self, key: KeyEvent) -> bool {
        let view = &mut self.views[self.focus as usize];
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') => return true,
            KeyCode::Esc if !self.help => return true,
            KeyCode::Char('?' | 'h') => self.help = !self.help,
            KeyCode::Esc => self.help = false,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Tab => self.focus = self.focus.next(),
            KeyCode::BackTab => self.focus = self.focus.next().next(),
            KeyCode::Char('1') => self.focus = Pane::Listeners,
            KeyCode::Char('2') => self.focus = Pane::Workers,
            KeyCode::Char('3') => self.focus = Pane::Servers,
            KeyCode::Char('s' | '>') | KeyCode::Right => view.sort = self.focus.column_after(view.sort),
            KeyCode::Char('<') | KeyCode::Left => view.sort = self.focus.column_before(view.sort),
            KeyCode::Char('r') => view.ascending = !view.ascending,
            KeyCode::Down | KeyCode::Char('j') => view.offset += 1,
            KeyCode::Up | KeyCode::Char('k') => view.offset = view.offset.saturating_sub(1),
            KeyCode::PageDown => view.offset += 10,
            KeyCode::PageUp => view.offset = view.offset.saturating_sub(10),
            KeyCode::Home => view.offset = 0,
            _ => {}
        }
        false
    }

    /// What a pane shows now.
    fn table(&self, pane: Pane) -> Table {
        let Some((newer, at)) = &self.newer else { return Table::default() };
        let older = self.older.as_ref().map(|(older, before)| (older, at.duration_since(*before)));
        let view = self.views[pane as usize];
        let mut table = rows::table(pane, newer, older);
        if let Some(column) = view.sort {
            table.sort(column, view.ascending);
        }
        table
    }
}
