//! A client of the Container Runtime Interface: the messages that the tests need, over HTTP/2 as gRPC frames them.

use std::path::Path;

use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::runtime::Runtime;

use crate::PATIENCE;

/// The messages, generated from `cri/cri.proto` and the shim's `cri/pod.proto`.
#[allow(
    missing_docs,
    clippy::all,
    rustdoc::all,
    ambiguous_glob_reexports,
    non_camel_case_types,
    non_upper_case_globals,
    unused
)] // generated code
pub mod messages {
    pub use self::{cri::*, pod::*};

    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// A connection to containerd's CRI.
pub struct Cri {
    runtime: Runtime,
    client: h2::client::SendRequest<bytes::Bytes>,
}

impl Cri {
    /// Connects to containerd's socket.
    pub fn connect(socket: &Path) -> Cri {
        // The connection goes on while anybody waits for an answer, which is enough.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("an event loop");
        let client = runtime.block_on(async {
            let stream = tokio::net::UnixStream::connect(socket).await;
            let stream = stream.expect("containerd listens");
            let (client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
            tokio::spawn(connection);
            client
        });
        Cri { runtime, client }
    }

    /// One call of the RuntimeService: its answer, or the message of its error.
    pub fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A, String> {
        let bounded =
            async { tokio::time::timeout(PATIENCE, self.exchange(method, request)).await };
        let answer = self.runtime.block_on(bounded);
        let bytes = answer.unwrap_or_else(|_| Err(format!("no answer in {PATIENCE:?}")));
        bytes.map(|bytes| A::parse_from_bytes(&bytes).expect("the published message"))
    }

    /// The same, which must succeed.
    #[track_caller]
    pub fn ok<A: Message>(&self, method: &str, request: &impl Message) -> A {
        match self.call(method, request) {
            Ok(answer) => answer,
            Err(error) => panic!("{method}: {error}"),
        }
    }

    async fn exchange(&self, method: &str, request: &impl Message) -> Result<Vec<u8>, String> {
        let head = Request::post(format!(
            "http://localhost/runtime.v1.RuntimeService/{method}"
        ))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .expect("a request");
        let message = request.write_to_bytes().expect("no required fields");
        // gRPC over HTTP2, "Length-Prefixed-Message": not compressed, length, message.
        let mut framed = vec![0];
        framed.extend((message.len() as u32).to_be_bytes());
        framed.extend(message);
        let mut client = self.client.clone().ready().await.expect("a connection");
        let (answer, mut body) = client.send_request(head, false).expect("a stream");
        body.send_data(framed.into(), true)
            .expect("a small message");
        let answer = answer.await.map_err(|error| error.to_string())?;
        failure(answer.headers())?;
        let mut stream = answer.into_body();
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.data().await {
            let chunk = chunk.map_err(|error| error.to_string())?;
            let _ = stream.flow_control().release_capacity(chunk.len());
            bytes.extend_from_slice(&chunk);
        }
        let trailers = stream.trailers().await.map_err(|error| error.to_string())?;
        failure(&trailers.unwrap_or_default())?;
        Ok(bytes.split_off(5.min(bytes.len())))
    }
}

/// The error in gRPC's status, if it is one.
fn failure(headers: &HeaderMap) -> Result<(), String> {
    match headers.get("grpc-status") {
        Some(status) if status != "0" => {
            let message = headers.get("grpc-message");
            let message = message.map_or("", |text| text.to_str().unwrap_or_default());
            Err(format!("status {status:?}: {message}"))
        }
        _ => Ok(()),
    }
}
