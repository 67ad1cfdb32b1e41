//! Calls of services that the shim does not offer, answered as calls of a method that it does not offer.
//!
//! ttrpc's server has `UNIMPLEMENTED` for an unknown method, but `INVALID_ARGUMENT` for an unknown service, from which a client that
//! asks whether there is one (Streaming, Transfer) learns that it has asked in a wrong way. So on its way to the server such a
//! request is given the name of a service that there is, and its own service and method together as the method's.

use std::{
    collections::BTreeSet,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use containerd_shim_protos::protobuf::{self, CodedInputStream, Message, rt::skip_field_for_tag};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::{
    MessageHeader, Request,
    proto::{MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST},
};

/// Bytes of a request that are asked for at once: its length is the client's word.
const CHUNK: usize = 64 << 10;
/// Fields 1 and 2 of ttrpc's Request, length-delimited.
const SERVICE: u32 = 1 << 3 | 2;
const METHOD: u32 = 2 << 3 | 2;

/// A connection whose requests name only services that there are.
pub struct Offers<S> {
    stream: S,
    services: Arc<BTreeSet<String>>,
    frame: Vec<u8>,
    next: Next,
}

/// What to do with the stream.
#[derive(Clone, Copy)]
enum Next {
    /// Collect a header, or a request.
    Collect,
    /// Give out the frame from here on, then `pass` bytes of the stream as they are.
    Give { from: usize, pass: usize },
}

impl<S> Offers<S> {
    /// A connection to a server of these services.
    pub fn new(stream: S, services: Arc<BTreeSet<String>>) -> Offers<S> {
        let (frame, next) = (Vec::new(), Next::Collect);
        Offers {
            stream,
            services,
            frame,
            next,
        }
    }

    /// How many bytes of the frame are missing for the next decision; 0: it is whole.
    fn missing(&self) -> usize {
        let Some(header) = self.frame.get(..MESSAGE_HEADER_LENGTH) else {
            return MESSAGE_HEADER_LENGTH - self.frame.len();
        };
        let header = MessageHeader::from(header);
        match is_looked_at(header) {
            true => MESSAGE_HEADER_LENGTH + header.length as usize - self.frame.len(),
            false => 0,
        }
    }

    /// The frame is whole, or its header says that nobody looks at it.
    fn decide(&mut self) {
        let header = MessageHeader::from(&self.frame[..MESSAGE_HEADER_LENGTH]);
        let pass = match is_looked_at(header) {
            true => 0,
            false => header.length as usize,
        };
        if pass == 0
            && let Some(request) = redirected(&self.frame[MESSAGE_HEADER_LENGTH..], &self.services)
        {
            let header = MessageHeader {
                length: request.len() as u32,
                ..header
            };
            self.frame = header.into();
            self.frame.extend(request);
        }
        self.next = Next::Give { from: 0, pass };
    }
}

/// Of other frames, and of one that the server refuses for its length, nothing is kept.
fn is_looked_at(header: MessageHeader) -> bool {
    header.type_ == MESSAGE_TYPE_REQUEST && header.length as usize <= MESSAGE_LENGTH_MAX
}

/// What the server is asked instead; `None`: what it was asked.
fn redirected(request: &[u8], services: &BTreeSet<String>) -> Option<Vec<u8>> {
    // What cannot be read is the server's to refuse.
    let (service, method) = names(request).ok()?;
    if services.contains(&service) {
        return None;
    }
    let instead = Request {
        service: services.first()?.clone(),
        method: format!("{service}/{method}"),
        ..Request::default()
    };
    instead.write_to_bytes().ok()
}

/// Service and method of a request, without its payload.
fn names(request: &[u8]) -> protobuf::Result<(String, String)> {
    let mut input = CodedInputStream::from_bytes(request);
    let (mut service, mut method) = (String::new(), String::new());
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            SERVICE => service = input.read_string()?,
            METHOD => method = input.read_string()?,
            tag => skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok((service, method))
}

impl<S: AsyncRead + Unpin> AsyncRead for Offers<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            match this.next {
                Next::Give { from, pass } if from < this.frame.len() => {
                    let rest = &this.frame[from..];
                    let given = rest.len().min(buffer.remaining());
                    buffer.put_slice(&rest[..given]);
                    let from = from + given;
                    this.next = Next::Give { from, pass };
                    return Poll::Ready(Ok(()));
                }
                Next::Give { from, pass } if pass > 0 => {
                    let most = pass.min(buffer.remaining());
                    let mut part = ReadBuf::new(buffer.initialize_unfilled_to(most));
                    ready!(Pin::new(&mut this.stream).poll_read(context, &mut part))?;
                    let read = part.filled().len();
                    buffer.advance(read);
                    let pass = pass - read;
                    this.next = Next::Give { from, pass };
                    return Poll::Ready(Ok(()));
                }
                Next::Give { .. } => {
                    // A request's memory is not kept for a connection that idles.
                    this.frame = Vec::new();
                    this.next = Next::Collect;
                }
                Next::Collect => match this.missing() {
                    0 => this.decide(),
                    missing => {
                        let before = this.frame.len();
                        this.frame.resize(before + missing.min(CHUNK), 0);
                        let mut part = ReadBuf::new(&mut this.frame[before..]);
                        let polled = Pin::new(&mut this.stream).poll_read(context, &mut part);
                        let read = part.filled().len();
                        this.frame.truncate(before + read);
                        ready!(polled)?;
                        if read == 0 {
                            // The end. Of a frame that is cut off the server sees what there is.
                            this.next = Next::Give { from: 0, pass: 0 };
                            if this.frame.is_empty() {
                                return Poll::Ready(Ok(()));
                            }
                        }
                    }
                },
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Offers<S> {
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let header = MessageHeader {
            length: payload.len() as u32,
            stream_id: 7,
            type_: kind,
            flags: 3,
        };
        let mut bytes: Vec<u8> = header.into();
        bytes.extend(payload);
        bytes
    }

    fn request(service: &str, payload: Vec<u8>) -> Vec<u8> {
        let request = Request {
            service: service.into(),
            method: "M".into(),
            payload,
            ..Request::default()
        };
        frame(MESSAGE_TYPE_REQUEST, &request.write_to_bytes().unwrap())
    }

    /// What the server reads when the client writes `sent` in pieces of this size and goes.
    fn received(sent: &[u8], piece: usize) -> Vec<u8> {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let (mut client, server) = duplex(piece);
            let services = BTreeSet::from(["a.Known".to_string()]);
            let mut offers = Offers::new(server, Arc::new(services));
            let mut all = Vec::new();
            let write = async {
                client.write_all(sent).await.unwrap();
                drop(client);
            };
            let (read, ()) = tokio::join!(offers.read_to_end(&mut all), write);
            read.unwrap();
            all
        })
    }

    #[test]
    fn only_a_request_for_an_unknown_service_is_another_one_for_the_server() {
        let known = request("a.Known", vec![1; 100_000]);
        let unknown = request("b.Unknown", vec![2; 100_000]);
        let others = [frame(3, b"data"), frame(9, &[0; 70_000]), frame(1, b"\xff")].concat();
        let sent = [&known[..], &others, &unknown, &known].concat();
        for piece in [1, 9, 11, 4096] {
            let got = received(&sent, piece);
            let same = known.len() + others.len();
            assert_eq!(got[..same], sent[..same]);
            let rest = &got[same..];
            let header = MessageHeader::from(&rest[..MESSAGE_HEADER_LENGTH]);
            assert_eq!((header.stream_id, header.type_, header.flags), (7, 1, 3));
            let end = MESSAGE_HEADER_LENGTH + header.length as usize;
            let asked = Request::parse_from_bytes(&rest[MESSAGE_HEADER_LENGTH..end]).unwrap();
            assert_eq!(asked.service, "a.Known");
            assert_eq!(
                (asked.method.as_str(), asked.payload.len()),
                ("b.Unknown/M", 0)
            );
            assert_eq!(rest[end..], known);
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_or_too_long_is_passed_on() {
        let known = request("a.Known", vec![1; 1000]);
        for length in [0, 1, 9, 10, 11, known.len() - 1] {
            assert_eq!(received(&known[..length], 64), known[..length]);
        }
        let mut long = frame(MESSAGE_TYPE_REQUEST, &[5; 1000]);
        long[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(received(&long, 64), long);
    }
}
