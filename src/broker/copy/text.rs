//! Texts that travel as header values.

use std::fmt::Write as _;

use bytes::Bytes;

/// Percent-encodes everything but visible ASCII, and `%`: any bytes travel as a header value.
///
/// ```
/// use guestlist::broker::copy::{decode, encode};
/// assert_eq!(encode(b"order-17"), "order-17");
/// assert_eq!(encode(b"a\r\n%"), "a%0D%0A%25");
/// assert_eq!(decode(b"a%0D%0A%25"), "a\r\n%");
/// ```
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_graphic() && byte != b'%' {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// Undoes [`encode`]; what is not encoded stays as it is.
pub fn decode(text: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                bytes.push(hex(*high) * 16 + hex(*low));
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes.into()
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

/// Makes any text safe as a header value and in a log: control characters (a CR or LF would panic
/// in one client and corrupt another's frame) and invisible ones that break lines or turn the
/// direction of writing are escaped, and it ends after at most `max` bytes.
///
/// ```
/// use guestlist::broker::copy::escape;
/// assert_eq!(escape("no\r\nway", 100), "no\\r\\nway");
/// assert_eq!(escape("é é", 3), "é");
/// ```
pub fn escape(text: &str, max: usize) -> String {
    let mut safe = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let start = safe.len();
        if c.is_control() || is_invisible(c) {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
        if safe.len() > max {
            safe.truncate(start);
            break;
        }
    }
    safe.trim().to_owned()
}

pub(super) fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}
