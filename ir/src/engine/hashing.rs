//! Hashes weights on a thread of its own, so that hashing and writing overlap. At most [`CHUNKS_WAITING`] chunks wait,
//! which bounds the memory: a writer that is faster than the hash waits for it.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::error::{Error, Kind, Result};

/// Chunks that may wait for the thread.
const CHUNKS_WAITING: usize = 4;

/// What the thread is told.
pub(super) enum Message {
    /// Bytes of the present weight.
    Data(Arc<Vec<u8>>),
    /// The present weight is complete.
    EndOfWeight,
}

/// Hashes weights on its own thread; yields one hash per weight.
#[derive(Debug)]
pub(super) struct Hashing {
    messages: SyncSender<Message>,
    thread: JoinHandle<Vec<[u8; 32]>>,
}

impl Hashing {
    pub(super) fn start() -> Result<Hashing> {
        let (messages, inbox) = sync_channel(CHUNKS_WAITING);
        let work = move || {
            let mut hashes = Vec::new();
            let mut hasher = blake3::Hasher::new();
            for message in inbox {
                match message {
                    Message::Data(chunk) => {
                        hasher.update(&chunk);
                    }
                    Message::EndOfWeight => {
                        hashes.push(*hasher.finalize().as_bytes());
                        hasher.reset();
                    }
                }
            }
            hashes
        };
        let thread = std::thread::Builder::new().name("engine-hash".into()).spawn(work).map_err(|e| {
            Error::new(Kind::OutOfMemory, "engine/thread", format!("cannot start the hashing thread: {e}"))
                .hint("raise the limit of threads of this user")
        })?;
        Ok(Hashing { messages, thread })
    }

    pub(super) fn send(&self, message: Message) -> Result<()> {
        self.messages.send(message).map_err(|_| Self::died())
    }

    /// One hash per weight, in order.
    pub(super) fn finish(self) -> Result<Vec<[u8; 32]>> {
        drop(self.messages);
        self.thread.join().map_err(|_| Self::died())
    }

    fn died() -> Error {
        Error::new(Kind::Internal, "engine/thread", "the hashing thread ended early")
            .hint("please report this")
    }
}
