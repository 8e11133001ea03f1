//! One place of the board: an address that a server has now, and whether it
//! may be used.
//!
//! Plain data, eight words. A place without an address is vacant. What the
//! words hold is never trusted to be sane: any bits decode to some place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Words of a place on the board.
pub const PLACE_WORDS: usize = 8;

/// Where a place leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// An IP address and a port.
    Ip(SocketAddr),
    /// The Unix socket that the configuration names.
    Unix,
}

/// What checks and real traffic say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// It answers, or nothing was said yet.
    #[default]
    Up,
    /// It does not.
    Down,
}

/// What the operator says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Admin {
    /// As the file has it.
    #[default]
    Ready,
    /// Nothing new, the old stays.
    Draining,
    /// Nothing new, and not checked.
    Disabled,
}

/// How a place stands, in the one word that `status` has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum State {
    Up,
    Down,
    Draining,
    Disabled,
    /// A name that has no address yet, or no more.
    Unresolved,
}

impl State {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            State::Up => "up",
            State::Down => "down",
            State::Draining => "draining",
            State::Disabled => "disabled",
            State::Unresolved => "unresolved",
        }
    }
}

/// One place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Where it leads; `None` = vacant.
    pub address: Option<Address>,
    /// Its share; 0 = nothing new.
    pub weight: u32,
    /// Places of the lowest tier that has one to use are used alone.
    pub tier: u32,
    /// What checks say.
    pub health: Health,
    /// What the operator says.
    pub admin: Admin,
    /// When its slow start began, in milliseconds of the monotonic clock; 0 =
    /// it is not in one.
    pub slow_start: u64,
    /// Sessions at once over all workers; 0 = any number.
    pub max_connections: u64,
    /// Grows whenever another address takes the place: a session of an
    /// earlier one is not the present one's.
    pub incarnation: u32,
    /// The share that its record in the DNS gives it; the file's weight counts
    /// times it.
    pub share: u32,
    /// The priority that its record gives it.
    pub priority: u16,
}

impl Place {
    /// How it stands.
    pub fn state(&self) -> State {
        match (self.admin, self.address, self.health) {
            (Admin::Disabled, _, _) => State::Disabled,
            (Admin::Draining, _, _) => State::Draining,
            (Admin::Ready, None, _) => State::Unresolved,
            (Admin::Ready, Some(_), Health::Down) => State::Down,
            (Admin::Ready, Some(_), Health::Up) => State::Up,
        }
    }

    /// The place as words.
    pub fn encode(&self) -> [u64; PLACE_WORDS] {
        let (kind, ip, port, scope) = match self.address {
            None => (0, 0, 0, 0),
            Some(Address::Unix) => (1, 0, 0, 0),
            Some(Address::Ip(SocketAddr::V4(v4))) => (2, u128::from(v4.ip().to_bits()), v4.port(), 0),
            Some(Address::Ip(SocketAddr::V6(v6))) => (3, v6.ip().to_bits(), v6.port(), v6.scope_id()),
        };
        let health = u64::from(self.health == Health::Down);
        let admin = match self.admin {
            Admin::Ready => 0u64,
            Admin::Draining => 1,
            Admin::Disabled => 2,
        };
        [
            kind | health << 8 | admin << 16 | u64::from(self.tier) << 32,
            u64::from(self.weight) | u64::from(self.incarnation) << 32,
            (ip >> 64) as u64,
            ip as u64,
            u64::from(port) | u64::from(scope) << 32,
            self.slow_start,
            self.max_connections,
            u64::from(self.share) | u64::from(self.priority) << 32,
        ]
    }

    /// The place that these words say.
    pub fn decode(words: &[u64; PLACE_WORDS]) -> Place {
        let ip = u128::from(words[2]) << 64 | u128::from(words[3]);
        let (port, scope) = (words[4] as u16, (words[4] >> 32) as u32);
        let address = match words[0] as u8 {
            1 => Some(Address::Unix),
            2 => Some(Address::Ip((IpAddr::V4(Ipv4Addr::from_bits(ip as u32)), port).into())),
            3 => Some(Address::Ip(SocketAddrV6::new(Ipv6Addr::from_bits(ip), port, 0, scope).into())),
            _ => None,
        };
        Place {
            address,
            weight: words[1] as u32,
            tier: (words[0] >> 32) as u32,
            health: if (words[0] >> 8) as u8 == 1 { Health::Down } else { Health::Up },
            admin: match (words[0] >> 16) as u8 {
                1 => Admin::Draining,
                2 => Admin::Disabled,
                _ => Admin::Ready,
            },
            slow_start: words[5],
            max_connections: words[6],
            incarnation: (words[1] >> 32) as u32,
            share: words[7] as u32,
            priority: (words[7] >> 32) as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address() -> impl Strategy<Value = Option<Address>> {
        let ip = any::<(IpAddr, u16)>().prop_map(|pair| Some(Address::Ip(pair.into())));
        prop_oneof![Just(None), Just(Some(Address::Unix)), ip]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            address in address(), weight: u32, tier: u32, down: bool, admin in 0..3,
            slow_start: u64, max_connections: u64, incarnation: u32,
            share: u32, priority: u16,
        ) {
            let admin = [Admin::Ready, Admin::Draining, Admin::Disabled][admin as usize];
            let health = if down { Health::Down } else { Health::Up };
            let place = Place {
                address, weight, tier, health, admin, slow_start, max_connections, incarnation, share, priority,
            };
            prop_assert_eq!(Place::decode(&place.encode()), place);
        }

        #[test]
        fn any_bits_are_some_place(words: [u64; PLACE_WORDS]) {
            let _ = Place::decode(&words);
        }
    }
}
