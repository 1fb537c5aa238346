//! `GET /containerLogs/<namespace>/<pod>/<container>`: what a container wrote. Sources: kubelet's `server.go`
//! (getContainerLogs), `kubelet_pods.go` (validateContainerLogStatus), core/v1 `ValidatePodLogOptions`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use jiff::Timestamp;
use tokio::sync::mpsc;

use super::body::{Answer, text};
use super::find::Refused;
use crate::container::log_reader::{Formatter, LogOptions, LogReader};
use crate::container::log_watch::LogWatch;
use crate::pod::context::reading_disk;
use crate::pod::directory::log_path;
use crate::pod::roster::{ContainerView, PodView, Roster};
use crate::pod::status::{State, container_id};

/// One piece of an answer, of which a client that is slow holds three: some 100 MB for 400 of them.
const PIECE_BYTES: usize = 64 * 1024;

/// What a request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Which part of the log.
    pub options: LogOptions,
    /// Whether to go on while the container runs.
    pub follow: bool,
    /// Whether the run before this one is meant.
    pub previous: bool,
}

impl LogRequest {
    /// Reads a query.
    ///
    /// # Errors
    /// 400 for what cannot be read, 422 for what makes no sense: as a kubelet.
    pub fn parse(query: Option<&str>, now: Timestamp) -> Result<Self, Refused> {
        let undecodable = |name: &str, value: &str| {
            // A kubelet's text, braces and all; the API server judges before it and says more.
            Refused::new(StatusCode::BAD_REQUEST, r#"{"message": "Unable to decode query."}"#)
                .because(format!("{name}: invalid value {value:?}"))
        };
        let mut request = Self::default();
        let mut since_seconds = None;
        let mut since_time = None;
        for (name, value) in super::find::query(query) {
            let number = || value.parse::<i64>().map_err(|_| undecodable(&name, &value));
            let flag = || match value.as_str() {
                "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
                _ => Err(undecodable(&name, &value)),
            };
            match name.as_str() {
                "follow" => request.follow = flag()?,
                "previous" => request.previous = flag()?,
                "timestamps" => request.options.timestamps = flag()?,
                "tailLines" => request.options.tail = Some(at_least(&name, number()?, 0)?),
                // An old client's name for it.
                "tail" if value == "all" => {}
                "tail" => request.options.tail = Some(at_least(&name, number()?, 0)?),
                "limitBytes" => request.options.limit_bytes = Some(at_least(&name, number()?, 1)?),
                "sinceSeconds" => since_seconds = Some(at_least(&name, number()?, 1)?),
                "sinceTime" => {
                    since_time = Some(value.parse::<Timestamp>().map_err(|_| undecodable(&name, &value))?);
                }
                "stream" if value != "All" => {
                    let message = format!("stream {value:?}: only All is served");
                    return Err(Refused::new(StatusCode::BAD_REQUEST, message));
                }
                _ => {}
            }
        }
        request.options.since = match (since_seconds, since_time) {
            (Some(_), Some(_)) => {
                return Err(invalid("at most one of `sinceTime` or `sinceSeconds` may be specified"));
            }
            (Some(seconds), None) => {
                let ago = jiff::SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
                Some(now.checked_sub(ago).unwrap_or(Timestamp::MIN))
            }
            (None, time) => time,
        };
        Ok(request)
    }
}

fn at_least(name: &str, value: i64, least: u64) -> Result<u64, Refused> {
    u64::try_from(value)
        .ok()
        .filter(|value| *value >= least)
        .ok_or_else(|| invalid(format!("{name}: {value}: must be greater than or equal to {least}")))
}

/// A query that can be read and makes no sense.
fn invalid(detail: impl Into<String>) -> Refused {
    Refused::new(StatusCode::UNPROCESSABLE_ENTITY, r#"{"message": "Invalid request."}"#).because(detail)
}

/// The number of the run whose log is meant, of a container in a pod of this name and uid.
fn run_of(
    (pod, uid): (&str, &str),
    name: &str,
    container: &ContainerView,
    previous: bool,
) -> Result<u32, Refused> {
    let bad = |message: String| Refused::new(StatusCode::BAD_REQUEST, message);
    let none = || bad(format!("previous terminated container {name:?} in pod {pod:?} not found"));
    match (&container.state, &container.last) {
        // It waits to run again: what there is is the run that ended, whether the next has its number already or not.
        (State::Waiting { .. }, Some(last)) if last.id == container_id(uid, name, container.restart) => {
            Ok(container.restart)
        }
        (State::Waiting { .. }, Some(_)) => container.restart.checked_sub(1).ok_or_else(none),
        (State::Waiting { reason, .. }, None) if !previous => {
            Err(bad(format!("container {name:?} in pod {pod:?} is waiting to start: {reason}")))
        }
        (_, Some(_)) if previous => container.restart.checked_sub(1).ok_or_else(none),
        _ if previous => Err(none()),
        _ => Ok(container.restart),
    }
}

/// The answer. `view` and `name` are the pod and its container.
///
/// # Errors
/// When there is no such log.
pub async fn answer(
    roster: &Arc<Roster>,
    watch: &Arc<LogWatch>,
    view: &Arc<PodView>,
    name: &str,
    request: LogRequest,
) -> Result<Response<Answer>, Refused> {
    let pod = view.pod.metadata.name.clone().unwrap_or_default();
    let reason = "ContainerCreating".to_owned();
    let state = State::Waiting { reason, message: String::new() };
    let waiting = ContainerView { state, last: None, restart: 0, run: None, probed: Arc::default() };
    let container = view.containers.get(name).unwrap_or(&waiting);
    let uid = view.pod.metadata.uid.clone().unwrap_or_default();
    let run = run_of((&pod, &uid), name, container, request.previous)?;
    let Some(directory) = &view.directory else {
        return Err(Refused::new(
            StatusCode::BAD_REQUEST,
            format!("container {name:?} in pod {pod:?} has no log: its directory was never made"),
        ));
    };
    let path = log_path(directory, name, run);
    let (pieces, body) = Answer::pieces();
    let source = Source {
        uid,
        isolated: view.isolated,
        container: name.to_owned(),
        run,
        roster: Arc::clone(roster),
        watch: Arc::clone(watch),
    };
    tokio::spawn(async move {
        if let Err(error) = send(path.clone(), request, source, &pieces).await {
            tracing::warn!(path = %path.display(), %error, "a container's log could not be read");
        }
    });
    let mut response = text(StatusCode::OK, String::new());
    *response.body_mut() = body;
    Ok(response)
}

/// The run whose log is sent.
struct Source {
    uid: String,
    isolated: bool,
    container: String,
    run: u32,
    roster: Arc<Roster>,
    watch: Arc<LogWatch>,
}

impl Source {
    /// Whether nothing more will be written: the supervisor has the whole log on disk before it tells the end.
    fn is_over(&self) -> bool {
        let Some(view) = self.roster.get(&self.uid) else { return true };
        view.containers.get(&self.container).is_none_or(|c| c.restart != self.run || c.run.is_none())
    }
}

async fn send(
    path: PathBuf,
    request: LogRequest,
    source: Source,
    pieces: &mpsc::Sender<Bytes>,
) -> std::io::Result<()> {
    let lost = |error: tokio::task::JoinError| std::io::Error::other(error.to_string());
    let (tail, watch, follow) = (request.options.tail, Arc::clone(&source.watch), request.follow);
    let owner = source.isolated.then(|| source.uid.clone());
    // Before the first read: what is written between that and the wait is told.
    let begin = reading_disk(move || {
        let changes = follow.then(|| watch.follow(path.parent().unwrap_or_else(|| Path::new("/"))));
        let reader = LogReader::new(path).owned_by(owner);
        let (reader, skip) = match tail {
            Some(tail) => reader.at_tail(tail)?,
            None => (reader, 0),
        };
        Ok::<_, std::io::Error>((reader, skip, changes))
    });
    let (mut reader, skip, mut changes) = begin.await.map_err(lost)??;
    let mut roster = source.roster.changes();
    let mut formatter = Formatter::new(&request.options, skip);
    let spare = Spare::default();
    loop {
        let over = source.is_over();
        // Until its end.
        loop {
            let mut shown = spare.take();
            let read = reading_disk(move || {
                let mut end = false;
                while shown.len() < PIECE_BYTES && !formatter.is_full() {
                    match reader.read() {
                        Ok(Some(bytes)) => formatter.take(bytes, &mut shown),
                        Ok(None) => {
                            end = true;
                            break;
                        }
                        Err(error) => return (reader, formatter, shown, Err(error)),
                    }
                }
                (reader, formatter, shown, Ok(end))
            });
            let (back, filter, shown, end) = read.await.map_err(lost)?;
            (reader, formatter) = (back, filter);
            if !shown.is_empty() && pieces.send(spare.lend(shown)).await.is_err() {
                return Ok(());
            }
            if formatter.is_full() {
                return Ok(());
            }
            if end? {
                break;
            }
        }
        reader.rest();
        spare.close();
        let Some(changes) = &mut changes else { return Ok(()) };
        if over {
            return Ok(());
        }
        tokio::select! {
            () = changes.changed() => {}
            _ = roster.changed() => {}
            () = pieces.closed() => return Ok(()),
            // A roster that nobody changes any more.
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Memory of pieces that have been sent, for those that follow. What a piece takes is the kernel's each time that it is
/// made anew, and most of a log's time went into its pages.
#[derive(Clone, Default)]
struct Spare(Arc<Mutex<Option<Vec<Vec<u8>>>>>);

/// A piece on its way; its memory comes back.
struct Lent {
    bytes: Vec<u8>,
    spare: Spare,
}

impl Spare {
    fn all(&self) -> MutexGuard<'_, Option<Vec<Vec<u8>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for a piece.
    fn take(&self) -> Vec<u8> {
        let spare = self.all().get_or_insert_default().pop();
        spare.unwrap_or_default()
    }

    fn lend(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { bytes, spare: self.clone() })
    }

    /// Lets all of it go, what is on its way too when it comes back, until the next is taken.
    fn close(&self) {
        *self.all() = None;
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        // No more than are on their way at once, which the body bounds.
        if let Some(spare) = &mut *self.spare.all() {
            spare.push(bytes);
        }
    }
}

/// How often a quiet log's container is looked at, whatever is told.
const LOOK: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::status::Terminated;

    #[test]
    fn a_pieces_memory_is_used_again_until_the_log_is_quiet() {
        let spare = Spare::default();
        let mut piece = spare.take();
        piece.extend_from_slice(b"abc");
        let address = piece.as_ptr();
        let lent = spare.lend(piece);
        let part = lent.slice(1..);
        drop(lent);
        assert_eq!(spare.take().capacity(), 0, "a part of it is still on its way");
        assert_eq!(part, "bc");
        drop(part);
        let piece = spare.take();
        assert_eq!((piece.as_ptr(), piece.len()), (address, 0));
        let lent = spare.lend(piece);
        spare.close();
        drop(lent);
        assert_eq!(spare.take().capacity(), 0);
    }

    fn parse(query: &str) -> Result<LogRequest, (u16, String)> {
        LogRequest::parse(Some(query), "2026-01-01T00:00:10Z".parse().unwrap())
            .map_err(|refused| (refused.status.as_u16(), refused.message))
    }

    #[test]
    fn a_query_is_read_as_a_kubelet_reads_it() {
        let request = parse("follow=true&tailLines=5&timestamps=1&limitBytes=9&previous=false").unwrap();
        assert!(request.follow && request.options.timestamps && !request.previous);
        assert_eq!((request.options.tail, request.options.limit_bytes), (Some(5), Some(9)));
        let since = parse("sinceSeconds=4").unwrap().options.since;
        assert_eq!(since, Some("2026-01-01T00:00:06Z".parse().unwrap()));
        let since = parse("sinceTime=2026-01-01T00%3A00%3A01%2B00%3A00").unwrap().options.since;
        assert_eq!(since, Some("2026-01-01T00:00:01Z".parse().unwrap()));
        assert_eq!(parse("tail=all").unwrap(), LogRequest::default());
        for (bad, status) in [
            ("tailLines=x", 400),
            ("follow=perhaps", 400),
            ("sinceTime=now", 400),
            ("stream=Stdout", 400),
            ("tailLines=-1", 422),
            ("limitBytes=0", 422),
            ("sinceSeconds=0", 422),
            ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", 422),
        ] {
            assert_eq!(parse(bad).unwrap_err().0, status, "{bad}");
        }
    }

    #[test]
    fn the_run_is_chosen_by_what_the_container_does() {
        let end = Terminated {
            exit_code: 1,
            signal: None,
            reason: None,
            message: String::new(),
            started_at: None,
            finished_at: Timestamp::UNIX_EPOCH,
            id: String::new(),
        };
        let waiting = |reason: &str| State::Waiting { reason: reason.to_owned(), message: String::new() };
        let running = State::Running { started_at: Timestamp::UNIX_EPOCH, id: String::new() };
        let view = |state: State, last: bool, restart| ContainerView {
            state,
            last: last.then(|| end.clone()),
            restart,
            run: None,
            probed: Arc::default(),
        };
        let chosen =
            |view: &ContainerView, previous| run_of(("p", "u"), "c", view, previous).map_err(|r| r.message);
        let first = view(waiting("ContainerCreating"), false, 0);
        assert_eq!(
            chosen(&first, false),
            Err("container \"c\" in pod \"p\" is waiting to start: ContainerCreating".to_owned())
        );
        assert!(chosen(&first, true).unwrap_err().starts_with("previous terminated container"));
        assert_eq!(chosen(&view(running.clone(), false, 0), false), Ok(0));
        assert_eq!(chosen(&view(running, true, 3), true), Ok(2));
        // While it waits the run that ended is both, also when the next one has its number already.
        let mut waits = view(waiting("CrashLoopBackOff"), true, 3);
        waits.last.as_mut().unwrap().id = container_id("u", "c", 3);
        assert_eq!((chosen(&waits, false), chosen(&waits, true)), (Ok(3), Ok(3)));
        waits.restart = 4;
        assert_eq!((chosen(&waits, false), chosen(&waits, true)), (Ok(3), Ok(3)));
        assert_eq!(chosen(&view(State::Terminated(end.clone()), false, 0), false), Ok(0));
    }
}
