//! Names of signals. Pure.

/// The signals that have names here, by Linux's numbers for x86-64 and Arm.
const NAMES: [(&str, u8); 11] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("TERM", 15),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("WINCH", 28),
];

/// The last real-time signal.
const LAST: u8 = 64;

/// A signal's number, from its name with or without `SIG`, or from its number as text.
pub fn parse(text: &str) -> Result<u8, String> {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    // `+2` would parse.
    if text.bytes().all(|b| b.is_ascii_digit())
        && let Ok(number) = text.parse()
    {
        return number_of(number);
    }
    Err(allowed())
}

/// A signal's number, if it is one.
pub fn number_of(number: u64) -> Result<u8, String> {
    u8::try_from(number).ok().filter(|n| (1..=LAST).contains(n)).ok_or_else(allowed)
}

fn allowed() -> String {
    let names = NAMES.map(|(name, _)| name).join(", ");
    format!("a signal is one of {names}, with or without SIG, or a number from 1 to {LAST}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_systems() {
        for (name, number) in NAMES {
            let system = format!("SIG{name}").parse::<nix::sys::signal::Signal>();
            assert_eq!(system.map(|signal| signal as i32), Ok(i32::from(number)), "{name}");
            assert_eq!(parse(name), Ok(number));
            assert_eq!(parse(&format!("SIG{name}")), Ok(number));
            assert_eq!(parse(&number.to_string()), Ok(number));
        }
        assert_eq!((parse("64"), number_of(1)), (Ok(64), Ok(1)));
        for bad in ["", "SIG", "int", "SIGSIGINT", "CHLD", "0", "65", "256", "+2", "-1", "2.0"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(number_of(0).is_err() && number_of(65).is_err() && number_of(u64::MAX).is_err());
    }
}
