//! The line by which an `identify` listener names its worker.
//!
//! Pure. On TCP the line comes before everything else, in any pieces; on UDP
//! it stands before each answer. A target that sends none is simply another
//! kind of server: the bytes go on to whoever checks the payload.

const PREFIX: &[u8] = b"evenkeel listener=";

/// A line is not longer than this.
const LONGEST: usize = 512;

/// Who answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The listener's name.
    pub listener: String,
    /// The worker's slot.
    pub slot: usize,
    /// The worker's process id.
    pub pid: u32,
    /// The generation in force.
    pub generation: u64,
}

/// Looks for the line at the start of a connection's bytes.
#[derive(Debug, Default)]
pub struct Finder {
    held: Vec<u8>,
    done: bool,
}

/// What `Finder` makes of bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// May still become a line.
    More,
    /// The line, and how many of the given bytes it used up.
    Line(Identity, usize),
    /// No line: what was held back, to be put before the given bytes.
    None(Vec<u8>),
}

impl Finder {
    /// Whether the question is settled.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Takes the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Found {
        let held = self.held.len();
        self.held.extend_from_slice(&bytes[..bytes.len().min(LONGEST)]);
        if !may_be_line(&self.held) {
            return self.give_up(held);
        }
        match self.held.iter().position(|byte| *byte == b'\n') {
            Some(end) => match parse(&self.held[..end]) {
                Some(identity) => {
                    self.done = true;
                    self.held = Vec::new();
                    Found::Line(identity, end + 1 - held)
                }
                None => self.give_up(held),
            },
            None if self.held.len() >= LONGEST => self.give_up(held),
            None => Found::More,
        }
    }

    fn give_up(&mut self, held: usize) -> Found {
        self.done = true;
        let mut bytes = std::mem::take(&mut self.held);
        bytes.truncate(held);
        Found::None(bytes)
    }
}

/// Splits a datagram into the line, where it has one, and the payload.
pub fn split_datagram(datagram: &[u8]) -> (Option<Identity>, &[u8]) {
    if !datagram.starts_with(PREFIX) {
        return (None, datagram);
    }
    let end = datagram.iter().take(LONGEST).position(|byte| *byte == b'\n');
    match end.and_then(|end| Some((parse(&datagram[..end])?, end))) {
        Some((identity, end)) => (Some(identity), &datagram[end + 1..]),
        None => (None, datagram),
    }
}

fn may_be_line(bytes: &[u8]) -> bool {
    let length = bytes.len().min(PREFIX.len());
    bytes[..length] == PREFIX[..length]
}

/// Reads the line without its end; later fields may be added behind.
fn parse(line: &[u8]) -> Option<Identity> {
    let text = std::str::from_utf8(line).ok()?;
    let field = |name: &str| {
        text.split(' ').find_map(|word| word.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')))
    };
    Some(Identity {
        listener: field("listener")?.to_string(),
        slot: field("slot")?.parse().ok().filter(|slot| *slot < 4096)?,
        pid: field("pid")?.parse().ok()?,
        generation: field("generation")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] = b"evenkeel listener=web slot=3 pid=4242 generation=7\n";

    fn identity() -> Identity {
        Identity { listener: "web".into(), slot: 3, pid: 4242, generation: 7 }
    }

    #[test]
    fn the_line_is_found_however_it_is_cut() {
        let whole = [LINE, b"payload"].concat();
        for cut in 1..whole.len() {
            let mut finder = Finder::default();
            match finder.feed(&whole[..cut]) {
                Found::Line(found, used) => assert_eq!((found, used), (identity(), LINE.len())),
                Found::More => {
                    assert_eq!(finder.feed(&whole[cut..]), Found::Line(identity(), LINE.len() - cut));
                }
                Found::None(_) => panic!("cut at {cut}"),
            }
            assert!(finder.is_done());
        }
    }

    #[test]
    fn other_bytes_are_given_back_whole() {
        assert_eq!(Finder::default().feed(b"HTTP/1.1"), Found::None(Vec::new()));
        let mut finder = Finder::default();
        assert_eq!(finder.feed(b"even"), Found::More);
        assert_eq!(finder.feed(b"tually"), Found::None(b"even".to_vec()));
        let mut finder = Finder::default();
        assert_eq!(finder.feed(b"evenkeel listener=web slot=x\n"), Found::None(Vec::new()));
    }

    #[test]
    fn a_line_without_an_end_is_given_up() {
        let mut finder = Finder::default();
        let endless = [PREFIX, &[b'x'; 200]].concat();
        assert_eq!(finder.feed(&endless), Found::More);
        assert_eq!(finder.feed(&[b'x'; 400]), Found::None(endless));
    }

    #[test]
    fn a_datagram_is_split_into_line_and_payload() {
        let datagram = [LINE, b"pay\nload"].concat();
        assert_eq!(split_datagram(&datagram), (Some(identity()), &b"pay\nload"[..]));
        assert_eq!(split_datagram(b"payload"), (None, &b"payload"[..]));
    }
}
