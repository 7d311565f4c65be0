//! A parser of server-sent events (WHATWG HTML, "Interpreting an event stream"): bytes in, blocks
//! out. It does no I/O and holds at most [`MAX_BLOCK`] bytes.

use std::time::Duration;

/// Most bytes of one block. The largest that Kiln sends is a line of 16 KiB, escaped and in base64.
pub const MAX_BLOCK: usize = 1024 * 1024;

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// `id:` of this block; a heartbeat has none.
    pub id: Option<String>,
    /// `data:`, its lines joined.
    pub data: String,
    /// `retry:`, how long to wait before the next connection.
    pub retry: Option<Duration>,
}

/// A block over [`MAX_BLOCK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an event of more than {MAX_BLOCK} bytes")]
pub struct TooLong;

/// The parser of one connection.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    /// The last byte ended a line and was a CR: a LF now belongs to it.
    after_cr: bool,
    started: bool,
    block: Block,
    has_data: bool,
    /// Bytes of the block so far.
    size: usize,
}

impl Parser {
    /// Takes the next bytes; gives the blocks that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Block>, TooLong> {
        let mut blocks = vec![];
        for &byte in bytes {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\n' | b'\r' => blocks.extend(self.end_line()),
                _ => {
                    self.size += 1;
                    if self.size > MAX_BLOCK {
                        return Err(TooLong);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(blocks)
    }

    fn end_line(&mut self) -> Option<Block> {
        let line = std::mem::take(&mut self.line);
        let mut line = String::from_utf8_lossy(&line).into_owned();
        if !std::mem::replace(&mut self.started, true)
            && let Some(rest) = line.strip_prefix('\u{feff}')
        {
            line = rest.to_owned();
        }
        if line.is_empty() {
            return self.end_block();
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.block.data.push('\n');
                }
                self.block.data.push_str(value);
            }
            "id" if !value.contains('\0') => self.block.id = Some(value.to_owned()),
            "retry" if value.bytes().all(|b| b.is_ascii_digit()) => {
                self.block.retry = value.parse().ok().map(Duration::from_millis);
            }
            // Comments, `event` (repeated in the data), and what is not known.
            _ => {}
        }
        None
    }

    fn end_block(&mut self) -> Option<Block> {
        self.size = 0;
        let block = std::mem::take(&mut self.block);
        std::mem::take(&mut self.has_data).then_some(block)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<Block> {
        Parser::default().push(text.as_bytes()).unwrap()
    }

    fn data(text: &str) -> Vec<String> {
        parse(text).into_iter().map(|block| block.data).collect()
    }

    #[test]
    fn a_block_has_id_data_and_retry() {
        let blocks = parse("retry: 1000\nid: 7\nevent: log\ndata: {\"a\":1}\n\n");
        let retry = Some(Duration::from_secs(1));
        assert_eq!(blocks, [Block { id: Some("7".into()), data: "{\"a\":1}".into(), retry }]);
    }

    #[test]
    fn an_id_is_of_its_block_alone() {
        let blocks = parse("id: 7\ndata: a\n\ndata: b\n\n");
        assert_eq!(blocks[1].id, None);
    }

    #[test]
    fn every_line_ending_is_understood() {
        assert_eq!(data("data: a\r\n\r\ndata: b\r\rdata: c\n\n"), ["a", "b", "c"]);
    }

    #[test]
    fn lines_of_data_are_joined_and_one_space_is_dropped() {
        assert_eq!(data("data: a\ndata:b\ndata:  c\ndata\n\n"), ["a\nb\n c\n"]);
    }

    #[test]
    fn comments_and_blocks_without_data_give_nothing() {
        assert_eq!(data(": hi\n\nevent: x\n\nid: 3\n\ndata: a\n\n"), ["a"]);
    }

    #[test]
    fn an_unfinished_block_is_not_given() {
        assert_eq!(data("data: a\n\ndata: b\n"), ["a"]);
    }

    #[test]
    fn a_byte_order_mark_is_dropped() {
        assert_eq!(data("\u{feff}data: a\n\n"), ["a"]);
    }

    #[test]
    fn bad_fields_are_ignored() {
        let blocks = parse("id: a\0b\nretry: soon\nretry: 99999999999999999999999\ndata: x\n\n");
        assert_eq!(blocks, [Block { id: None, data: "x".into(), retry: None }]);
    }

    #[test]
    fn a_block_at_the_bound_passes_and_one_byte_more_does_not() {
        let block = |n: usize| format!("data:{}\n\n", "x".repeat(n));
        let fits = MAX_BLOCK - "data:".len();
        assert_eq!(data(&block(fits))[0].len(), fits);
        assert_eq!(Parser::default().push(block(fits + 1).as_bytes()), Err(TooLong));
        assert_eq!(data(&block(fits).repeat(2)).len(), 2, "the bound is a block's");
    }

    proptest::proptest! {
        #[test]
        fn chunks_do_not_matter(text in "(data|id|retry|:|é|[a-c ]|\r|\n|\r\n){0,40}", size in 1..9usize) {
            let mut parser = Parser::default();
            let pieces: Vec<_> =
                text.as_bytes().chunks(size).flat_map(|part| parser.push(part).unwrap()).collect();
            assert_eq!(pieces, parse(&text));
        }
    }
}
