//! A pair of sockets between two processes of the pretend world, with the ways
//! in which the kernel's can fail.

use std::collections::VecDeque;

/// Ends of a channel.
pub const SENDER: usize = 0;
pub const RECEIVER: usize = 1;

pub type Item = u32;

pub enum Message {
    Bundle(Vec<Item>),
    FlowsDone,
    Done,
    Taken(Vec<usize>),
    Refused,
}

/// A pair of sockets: what was sent before an end arrives, and an error stands
/// in front of it where the other end was closed with something unread.
#[derive(Default)]
pub struct Channel {
    inbox: [VecDeque<Message>; 2],
    pub closed: [bool; 2],
    reset: [bool; 2],
    pub shut: bool,
}

impl Channel {
    pub fn send(&mut self, from: usize, message: Message) -> bool {
        let goes = !self.shut && !self.closed[1 - from];
        if goes {
            self.inbox[1 - from].push_back(message);
        }
        goes
    }

    pub fn receive(&mut self, at: usize) -> Heard {
        if std::mem::take(&mut self.reset[at]) {
            Heard::Error
        } else if let Some(message) = self.inbox[at].pop_front() {
            Heard::Message(message)
        } else if self.shut || self.closed[1 - at] {
            Heard::End
        } else {
            Heard::Nothing
        }
    }

    pub fn close(&mut self, end: usize) {
        self.closed[end] = true;
        self.reset[1 - end] = !self.inbox[end].is_empty();
    }
}

pub enum Heard {
    Message(Message),
    Nothing,
    End,
    Error,
}
