use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::Empty,
    shim_async::{Events as Service, create_events},
};
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;

impl Events {
    /// A queue that nobody empties but the test.
    pub(crate) fn kept() -> (Events, mpsc::Receiver<(SystemTime, Event)>) {
        let waiting = watch::Sender::new(0);
        let (queue, receiver) = mpsc::channel(CAPACITY);
        let queue = Some(queue);
        (Events { queue, waiting }, receiver)
    }
}

/// containerd's side: keeps what it is told.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Envelope>>>);

#[async_trait]
impl Service for Told {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        self.0.lock().unwrap().push(envelope);
        Ok(Empty::default())
    }
}

async fn serve(path: &Path, told: &Told) -> Server {
    let _ = std::fs::remove_file(path);
    let service = create_events(Arc::new(told.clone()));
    let mut server = Server::new()
        .bind(&format!("unix://{}", path.display()))
        .unwrap()
        .register_service(service);
    server.start().await.unwrap();
    server
}

fn exit(number: u32) -> Event {
    Event::Exit(wire::TaskExit {
        container_id: "c".into(),
        id: "c".into(),
        pid: number,
        ..wire::TaskExit::default()
    })
}

#[tokio::test]
async fn events_keep_their_order_over_a_restart_of_containerd() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ttrpc");
    let events = Events::start("ns", path.to_str().unwrap());
    // Nobody listens yet.
    events.publish(exit(1));
    events.publish(exit(2));
    let told = Told::default();
    let mut server = serve(&path, &told).await;
    events.drained(Duration::from_secs(30)).await;
    server.shutdown().await.unwrap();
    drop(server);
    events.publish(exit(3));
    let _server = serve(&path, &told).await;
    events.publish(exit(4));
    events.drained(Duration::from_secs(30)).await;
    let told = told.0.lock().unwrap();
    let pids: Vec<u32> = told
        .iter()
        .map(|envelope| {
            assert_eq!(
                (envelope.topic.as_str(), envelope.namespace.as_str()),
                ("/tasks/exit", "ns")
            );
            assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
            wire::TaskExit::parse_from_bytes(&envelope.event.value)
                .unwrap()
                .pid
        })
        .collect();
    assert_eq!(pids, [1, 2, 3, 4]);
}

#[tokio::test]
async fn without_an_address_nothing_is_told_and_nothing_waits() {
    let events = Events::start("ns", "");
    events.publish(exit(1));
    events.drained(Duration::from_secs(60)).await;
}
