//! The words that stand for our enums in the file, in the status and in the log.
//!
//! One table an enum, read both ways; it must be in the order that messages
//! list the words in.

use super::{
    AcceptProxy, AllDown, Balance, Check, Format, Level, Mode, Multicast, OnDown, OnStop, SendProxy, Service,
    Steering,
};

/// An enum whose values have words.
pub trait Word: Copy + PartialEq + 'static {
    /// Every value with its word.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        let found = Self::WORDS.iter().find(|(_, value)| *value == self);
        found.expect("every value has a word").0
    }
}

impl Word for Level {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
        ("trace", Self::Trace),
    ];
}

impl Word for Format {
    const WORDS: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

impl Word for Mode {
    const WORDS: &'static [(&'static str, Self)] = &[("tcp", Self::Tcp), ("udp", Self::Udp)];
}

impl Word for Steering {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("hash", Self::Hash),
        ("cpu", Self::Cpu),
        ("source", Self::Source),
        ("random", Self::Random),
        ("load-aware", Self::LoadAware),
    ];
}

impl Word for Service {
    const WORDS: &'static [(&'static str, Self)] =
        &[("echo", Self::Echo), ("identify", Self::Identify), ("discard", Self::Discard)];
}

impl Word for Balance {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("round-robin", Self::RoundRobin),
        ("least-connections", Self::LeastConnections),
        ("two-choices", Self::TwoChoices),
        ("source-hash", Self::SourceHash),
    ];
}

impl Word for Multicast {
    const WORDS: &'static [(&'static str, Self)] = &[("partition", Self::Partition), ("copy", Self::Copy)];
}

impl Word for SendProxy {
    const WORDS: &'static [(&'static str, Self)] = &[("off", Self::Off), ("v1", Self::V1), ("v2", Self::V2)];
}

impl Word for AcceptProxy {
    const WORDS: &'static [(&'static str, Self)] = &[("off", Self::Off), ("on", Self::On)];
}

impl Word for OnStop {
    const WORDS: &'static [(&'static str, Self)] = &[("drain", Self::Drain), ("park", Self::Park)];
}

impl Word for AllDown {
    const WORDS: &'static [(&'static str, Self)] = &[("close", Self::Close), ("try-any", Self::TryAny)];
}

impl Word for OnDown {
    const WORDS: &'static [(&'static str, Self)] = &[("keep", Self::Keep), ("reset", Self::Reset)];
}

impl Word for Check {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("none", Self::None),
        ("connect", Self::Connect),
        ("http", Self::Http),
        ("exchange", Self::Exchange),
        ("command", Self::Command),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;

    fn words_are_those_of_json<T: Word + Serialize>() {
        for (word, value) in T::WORDS {
            assert_eq!(serde_json::to_value(value).unwrap(), *word);
            assert_eq!(value.word(), *word);
        }
    }

    #[test]
    fn the_file_and_json_use_the_same_words() {
        words_are_those_of_json::<Level>();
        words_are_those_of_json::<Format>();
        words_are_those_of_json::<Mode>();
        words_are_those_of_json::<Service>();
        words_are_those_of_json::<Steering>();
        words_are_those_of_json::<Balance>();
        words_are_those_of_json::<Multicast>();
        words_are_those_of_json::<SendProxy>();
        words_are_those_of_json::<AcceptProxy>();
        words_are_those_of_json::<OnStop>();
        words_are_those_of_json::<AllDown>();
        words_are_those_of_json::<OnDown>();
        words_are_those_of_json::<Check>();
    }
}
