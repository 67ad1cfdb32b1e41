//! The connection to the agent: frames that are small enough, whole, and of the form that ttrpc has; and its end.
//!
//! ttrpc itself takes 4 MiB a frame and reads its envelope whatever is in it. Here a frame is collected up to its limit and looked
//! at before ttrpc gets a byte of it. The first one that breaks the rules ends the connection: only a guest that is not ours
//! any more sends such a thing.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

use super::answer::check_envelope;
use crate::audit::{Audit, Event};

/// Largest frame from the agent: its longest answers are a list of ports and the text of an error.
const MAX_FRAME: u32 = 256 << 10;
/// While an answer with a cgroup's files is due.
const MAX_STATS_FRAME: u32 = 1 << 20;
/// Read at once.
const CHUNK: usize = 8 << 10;

/// What is known of a connection beside its bytes.
#[derive(Clone, Debug)]
pub(super) struct State(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Why the connection has ended.
    ended: watch::Sender<Option<String>>,
    /// Requests whose answers may be long.
    long: AtomicU32,
    /// Requests that no answer has come to.
    asked: AtomicU64,
    audit: Audit,
}

/// As long as this is there, an answer may be long.
pub(super) struct Long(State);

impl Drop for Long {
    fn drop(&mut self) {
        self.0.0.long.fetch_sub(1, Ordering::Relaxed);
    }
}

impl State {
    fn new(audit: &Audit) -> State {
        State(Arc::new(Shared {
            ended: watch::Sender::new(None),
            long: AtomicU32::new(0),
            asked: AtomicU64::new(0),
            audit: audit.clone(),
        }))
    }

    /// Allows a long answer.
    pub(super) fn allow_long(&self) -> Long {
        self.0.long.fetch_add(1, Ordering::Relaxed);
        Long(self.clone())
    }

    /// One more answer may come, whenever that is. Call it before the request is sent.
    pub(super) fn ask(&self) {
        self.0.asked.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the right to an answer. A guest that answers what nobody has asked would have us read
    /// nothing else.
    fn is_asked(&self) -> bool {
        let less_one = |asked: u64| asked.checked_sub(1);
        let asked = &self.0.asked;
        asked
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less_one)
            .is_ok()
    }

    /// The connection cannot be used any more; the first reason stays.
    pub(super) fn end(&self, reason: &str) {
        self.0.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert_with(|| reason.into());
            first
        });
    }

    /// The same, because the guest broke a rule: it is told of.
    pub(super) fn refuse(&self, limit: &str, reason: &str) {
        let event = Event::limit("agent", limit, None, reason);
        self.0.audit.tell(event);
        self.end(reason);
    }

    /// Waits for the connection's end: the reason.
    pub(super) async fn ended(&self) -> String {
        let mut ended = self.0.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().expect("waited for it"),
            Err(_) => unreachable!("the sender is in self"),
        }
    }

    fn limit(&self) -> u32 {
        match self.0.long.load(Ordering::Relaxed) {
            0 => MAX_FRAME,
            _ => MAX_STATS_FRAME,
        }
    }
}

/// A connection whose frames are looked at.
pub(super) struct Line<S> {
    stream: S,
    state: State,
    /// The frame that is being collected, or handed on.
    frame: Vec<u8>,
    /// Bytes of it that were handed on; `None`: it is not whole.
    given: Option<usize>,
}

impl<S> Drop for Line<S> {
    fn drop(&mut self) {
        self.state.end("the connection was given up");
    }
}

impl<S> Line<S> {
    pub(super) fn new(stream: S, audit: &Audit) -> (Line<S>, State) {
        let state = State::new(audit);
        let line = Line {
            stream,
            state: state.clone(),
            frame: Vec::new(),
            given: None,
        };
        (line, state)
    }

    /// Bytes that the frame lacks, as far as is known. Looks at what is there.
    fn lacks(&self) -> Result<usize, String> {
        let have = self.frame.len();
        if have < MESSAGE_HEADER_LENGTH {
            return Ok(MESSAGE_HEADER_LENGTH - have);
        }
        let header = MessageHeader::from(&self.frame[..MESSAGE_HEADER_LENGTH]);
        let limit = self.state.limit();
        if header.length > limit && have == MESSAGE_HEADER_LENGTH {
            let length = header.length;
            return Err(format!(
                "a frame of {length} bytes, where {limit} are the most"
            ));
        }
        let whole = MESSAGE_HEADER_LENGTH + header.length as usize;
        if have == whole {
            if header.type_ != MESSAGE_TYPE_RESPONSE {
                return Err(format!(
                    "a frame of type {}, which is no answer",
                    header.type_
                ));
            }
            if !self.state.is_asked() {
                return Err("an answer to nothing".into());
            }
            check_envelope(&self.frame[MESSAGE_HEADER_LENGTH..])
                .map_err(|refusal| format!("an answer that is not understood: {refusal}"))?;
        }
        Ok(whole - have)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Line<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let line = &mut *self;
        loop {
            if let Some(given) = &mut line.given {
                let rest = &line.frame[*given..];
                let count = rest.len().min(buffer.remaining());
                buffer.put_slice(&rest[..count]);
                *given += count;
                if *given == line.frame.len() {
                    line.given = None;
                    line.frame.clear();
                    // A pod that idles for days does not keep its longest answer's memory.
                    line.frame.shrink_to(CHUNK);
                }
                return Poll::Ready(Ok(()));
            }
            let lacks = match line.lacks() {
                Ok(lacks) => lacks,
                Err(what) => {
                    let reason = format!("the guest's agent has sent {what}");
                    line.state.refuse("frame", &reason);
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, reason)));
                }
            };
            if lacks == 0 {
                line.given = Some(0);
                continue;
            }
            let mut chunk = [0; CHUNK];
            let mut chunk = ReadBuf::new(&mut chunk[..lacks.min(CHUNK)]);
            let read = ready!(Pin::new(&mut line.stream).poll_read(context, &mut chunk));
            if let Err(error) = &read {
                line.state.end(&format!("reading failed: {error}"));
            }
            read?;
            if chunk.filled().is_empty() {
                line.state.end("the guest has closed the connection");
                return Poll::Ready(Ok(()));
            }
            line.frame.extend_from_slice(chunk.filled());
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Line<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut header = MessageHeader::new_response(1, payload.len() as u32);
        header.type_ = kind;
        let mut bytes: Vec<u8> = header.into();
        bytes.extend(payload);
        bytes
    }

    /// A status with a text of this many bytes.
    fn answer(text: usize) -> Vec<u8> {
        use protobuf::Message;
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(ttrpc::Code::OK, "x".repeat(text)));
        frame(MESSAGE_TYPE_RESPONSE, &response.write_to_bytes().unwrap())
    }

    async fn read(sent: Vec<u8>, long: bool) -> (io::Result<Vec<u8>>, State) {
        let (ours, mut theirs) = tokio::io::duplex(1000);
        let (mut line, state) = Line::new(ours, &Audit::default());
        // As many as a test has answers.
        (0..3).for_each(|_| state.ask());
        let allowed = long.then(|| state.allow_long());
        let send = async {
            // It may be refused before its end.
            let _ = theirs.write_all(&sent).await;
            drop(theirs);
        };
        let receive = async {
            let mut received = Vec::new();
            let read = line.read_to_end(&mut received).await;
            drop(line);
            read.map(|_| received)
        };
        let both = async { tokio::join!(receive, send) };
        let both = tokio::time::timeout(Duration::from_secs(10), both).await;
        drop(allowed);
        (both.expect("it ends").0, state)
    }

    #[tokio::test]
    async fn answers_pass_as_they_are() {
        let sent = [answer(0), answer(100_000), answer(7)].concat();
        let (received, state) = read(sent.clone(), false).await;
        assert_eq!(received.unwrap(), sent);
        assert!(state.ended().await.contains("closed"));
    }

    #[tokio::test]
    async fn a_frame_past_its_limit_ends_the_connection() {
        for (text, long, passes) in [
            (300 << 10, false, false),
            (300 << 10, true, true),
            (1 << 20, true, false),
        ] {
            let (received, state) = read(answer(text), long).await;
            assert_eq!(received.is_ok(), passes, "{text} {long}");
            if !passes {
                assert!(state.ended().await.contains("a frame of"));
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_ends_the_connection() {
        // Of the types that ttrpc has, and of the envelopes that it would decode.
        for sent in [
            frame(1, b""),
            frame(3, b""),
            frame(MESSAGE_TYPE_RESPONSE, &[0x38, 1]),
        ] {
            let (received, state) = read(sent, false).await;
            assert!(received.is_err());
            assert!(state.ended().await.contains("has sent"));
        }
    }
}
