//! The events that containerd is told, in one queue, in the order in which they happened.
//!
//! ```text
//! publish ──► queue ──► Forward over TTRPC_ADDRESS ──► done
//!                 ▲              │ no connection, no answer in 5 s
//!                 └── same event ┘ again, until it is too old
//! ```
//!
//! An event is never overtaken by a later one. containerd may be restarted meanwhile: the connection is made anew.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    events::task as wire,
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    topics,
};
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::transport::Socket;

/// Events that wait at most; more come only when containerd has been away for long, and are dropped.
const CAPACITY: usize = 2048;
/// How long containerd may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an event is worth telling. Whoever starts later asks for the state instead.
const WORTH: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Something that happened to a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A task was made.
    Create(wire::TaskCreate),
    /// Its init runs.
    Start(wire::TaskStart),
    /// A process was added.
    ExecAdded(wire::TaskExecAdded),
    /// An added process runs.
    ExecStarted(wire::TaskExecStarted),
    /// The kernel killed a process of the task for memory.
    Oom(wire::TaskOOM),
    /// A process ended.
    Exit(wire::TaskExit),
    /// It stands still.
    Paused(wire::TaskPaused),
    /// It goes on.
    Resumed(wire::TaskResumed),
    /// It is gone.
    Delete(wire::TaskDelete),
}

/// Package of the events' messages.
const PACKAGE: &str = "containerd.events";

impl Event {
    fn topic(&self) -> &'static str {
        match self {
            Event::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Event::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Event::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Event::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Event::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Event::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Event::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Event::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
            Event::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
        }
    }

    fn message(&self) -> Any {
        match self {
            Event::Create(event) => any(PACKAGE, event),
            Event::Start(event) => any(PACKAGE, event),
            Event::ExecAdded(event) => any(PACKAGE, event),
            Event::ExecStarted(event) => any(PACKAGE, event),
            Event::Oom(event) => any(PACKAGE, event),
            Event::Exit(event) => any(PACKAGE, event),
            Event::Paused(event) => any(PACKAGE, event),
            Event::Resumed(event) => any(PACKAGE, event),
            Event::Delete(event) => any(PACKAGE, event),
        }
    }
}

/// A message as containerd's `typeurl` names it: by its full name alone. The package is given, because to ask the message would
/// build the descriptors of all messages, half a megabyte in every pod.
pub fn any<M: Message>(package: &str, message: &M) -> Any {
    Any {
        type_url: format!("{package}.{}", M::NAME),
        value: message
            .write_to_bytes()
            .expect("proto3 messages have no required fields"),
        ..Any::default()
    }
}

/// A time for containerd.
pub fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(time))
}

/// The queue's end for those to whom something happens.
#[derive(Clone, Debug)]
pub struct Events {
    queue: Option<mpsc::Sender<(SystemTime, Event)>>,
    waiting: watch::Sender<usize>,
}

impl Events {
    /// Begins to publish for `namespace` to containerd's ttrpc `address`; an empty one means that nobody wants to know (CRI-O).
    pub fn start(namespace: &str, address: &str) -> Events {
        let waiting = watch::Sender::new(0);
        let path = address.strip_prefix("unix://").unwrap_or(address);
        if path.is_empty() {
            let queue = None;
            return Events { queue, waiting };
        }
        let (queue, receiver) = mpsc::channel(CAPACITY);
        let publisher = Publisher {
            namespace: namespace.into(),
            path: path.into(),
            client: None,
        };
        tokio::spawn(publisher.run(receiver, waiting.clone()));
        let queue = Some(queue);
        Events { queue, waiting }
    }

    /// Puts an event at the queue's end. Never waits.
    pub fn publish(&self, event: Event) {
        tracing::debug!(topic = event.topic(), "event");
        let Some(queue) = &self.queue else { return };
        self.waiting.send_modify(|count| *count += 1);
        if let Err(error) = queue.try_send((SystemTime::now(), event)) {
            self.waiting.send_modify(|count| *count -= 1);
            let (_, event) = match error {
                mpsc::error::TrySendError::Full(event) => event,
                mpsc::error::TrySendError::Closed(event) => event,
            };
            tracing::error!(topic = event.topic(), "event dropped: the queue is full");
        }
    }

    /// Waits until everything published has been told, at most `limit`.
    pub async fn drained(&self, limit: Duration) {
        let mut waiting = self.waiting.subscribe();
        let empty = waiting.wait_for(|count| *count == 0);
        // Whoever waits is about to end: what is left then is lost like with a crash.
        let _ = tokio::time::timeout(limit, empty).await;
    }
}

struct Publisher {
    namespace: String,
    path: String,
    client: Option<EventsClient>,
}

impl Publisher {
    async fn run(
        mut self,
        mut queue: mpsc::Receiver<(SystemTime, Event)>,
        waiting: watch::Sender<usize>,
    ) {
        while let Some((time, event)) = queue.recv().await {
            self.tell(time, &event).await;
            waiting.send_modify(|count| *count -= 1);
        }
    }

    async fn tell(&mut self, time: SystemTime, event: &Event) {
        let topic = event.topic();
        let envelope = Envelope {
            timestamp: timestamp(time),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: MessageField::some(event.message()),
            ..Envelope::default()
        };
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.forward(&request).await {
                Ok(()) => return,
                Err(error) => error,
            };
            self.client = None;
            if time.elapsed().unwrap_or_default() > WORTH {
                tracing::error!(topic, %error, "event dropped: containerd did not take it for too long");
                return;
            }
            tracing::debug!(topic, %error, "event not taken, trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> Result<(), String> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let stream = tokio::net::UnixStream::connect(Path::new(&self.path)).await;
                let stream = stream.map_err(|error| format!("{}: {error}", self.path))?;
                let client = EventsClient::new(Client::new(Socket::new(stream)));
                self.client.insert(client)
            }
        };
        let context = ttrpc::context::with_duration(ANSWER);
        match client.forward(context, request).await {
            Ok(_) => Ok(()),
            // containerd has understood and refused: the same words would be refused again.
            Err(ttrpc::Error::RpcStatus(status))
                if status.code() == ttrpc::Code::INVALID_ARGUMENT =>
            {
                tracing::error!(message = status.message(), "event refused by containerd");
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
