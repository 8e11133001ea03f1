//! Lines that wait to be written, and the thread that writes them.
//!
//! The thread begins with the first line and ends when none came for a while:
//! a process that says nothing has one thread, and each of its system calls is
//! cheaper for it (neither the kernel nor the C library has to guard what
//! threads share). Bounded by `LINES`. What does not fit is dropped.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait to be written, for each process.
const LINES: usize = 4096;
/// How long the thread waits for another line.
const LINGER: Duration = Duration::from_secs(10);
/// How long a process that ends waits for what is not written.
const PATIENCE: Duration = Duration::from_secs(1);

/// The queue of one process.
#[derive(Debug)]
pub struct Queue<O> {
    /// Its thread, while there is one.
    writer: Mutex<Option<Writer>>,
    output: O,
}

#[derive(Debug)]
struct Writer {
    lines: Sender<Vec<u8>>,
    /// Hangs up when everything is written.
    done: Receiver<()>,
}

impl<O> Queue<O> {
    /// A queue towards this output.
    pub fn new(output: O) -> Queue<O> {
        Queue { writer: Mutex::new(None), output }
    }
}

impl<O: Send + Sync + 'static> Queue<O>
where
    for<'a> &'a O: Write,
{
    fn push(self: &Arc<Self>, line: &[u8]) {
        let mut writer = self.lock();
        if writer.is_none() {
            *writer = self.begin();
        }
        if let Some(writer) = &*writer {
            let _ = writer.lines.try_send(line.to_vec());
        }
    }

    /// `None` where the host allows no further thread: the line is dropped, and
    /// the next one tries again.
    fn begin(self: &Arc<Self>) -> Option<Writer> {
        let (lines, waiting) = bounded(LINES);
        let (alive, done) = bounded(0);
        let queue = Arc::clone(self);
        let work = move || {
            queue.write(&waiting);
            drop(alive);
        };
        thread::Builder::new().name("log".into()).spawn(work).ok()?;
        Some(Writer { lines, done })
    }

    /// The thread's work: until nobody can send a line any more.
    fn write(&self, waiting: &Receiver<Vec<u8>>) {
        loop {
            match waiting.recv_timeout(LINGER) {
                // A log that cannot be written has nowhere to say so.
                Ok(line) => drop((&self.output).write_all(&line)),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    let mut writer = self.lock();
                    // Lines are sent under the lock: none can come in between.
                    if waiting.is_empty() {
                        *writer = None;
                        return;
                    }
                }
            }
        }
    }

    /// Writes out what waits, unless that takes too long.
    pub fn flush(&self) {
        let writer = self.lock().take();
        if let Some(Writer { lines, done }) = writer {
            drop(lines);
            let _ = done.recv_timeout(PATIENCE);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Writer>> {
        self.writer.lock().expect("no thread panics with it")
    }
}

/// Where formatted lines are handed in.
pub struct Entrance<O>(pub Arc<Queue<O>>);

impl<'a, O: 'a> MakeWriter<'a> for Entrance<O>
where
    &'a Entrance<O>: Write,
{
    type Writer = &'a Entrance<O>;

    fn make_writer(&'a self) -> &'a Entrance<O> {
        self
    }
}

impl<O: Send + Sync + 'static> Write for &Entrance<O>
where
    for<'a> &'a O: Write,
{
    /// A line at a time, as it is formatted.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !line.is_empty() {
            self.0.push(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, PipeReader, PipeWriter};

    use super::*;

    fn queue() -> (Arc<Queue<PipeWriter>>, PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (Arc::new(Queue::new(writer)), reader)
    }

    #[test]
    fn lines_come_out_in_order_and_a_flush_waits_for_them() {
        let (queue, reader) = queue();
        for round in 0..3 {
            for number in 0..100 {
                queue.push(format!("{round} {number}\n").as_bytes());
            }
            queue.flush();
        }
        drop(queue);
        let lines: Vec<String> = BufReader::new(reader).lines().map(Result::unwrap).collect();
        let expected: Vec<String> =
            (0..3).flat_map(|round| (0..100).map(move |number| format!("{round} {number}"))).collect();
        assert_eq!(lines, expected);
    }

    #[test]
    fn without_a_line_there_is_no_thread() {
        let (queue, _reader) = queue();
        assert!(queue.lock().is_none());
        queue.push(b"first\n");
        assert!(queue.lock().is_some());
        queue.flush();
        assert!(queue.lock().is_none());
    }

    #[test]
    fn a_reader_that_is_stuck_stalls_nobody() {
        let (queue, reader) = queue();
        // Far more than the pipe and the queue hold.
        for _ in 0..2 * LINES {
            queue.push(&[b'x'; 1024]);
        }
        queue.flush();
        drop(reader);
    }
}
