//! What keeps the Node true while the pilot runs: one task renews the Lease, one writes labels, annotations and
//! status, one watches the Node. None of them ends because a call failed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};

use super::alivetime::{LONGEST_WAIT, Plan, Published, Timing, plan, retry_after};
use super::api::{CallError, Kind, Trouble, call};
use super::identity::still_ours;
use super::lease::{DURATION, Found, Keeper, next_renewal};
use super::object::{INSTANCE, status, upkeep_patch};
use super::shared::{Shared, Writer, observed};
use super::spread::Part;
use super::status::{Health, conditions, given_up, is_old};

/// Pause before the Node is read again after a conflict: no more than ten rounds a second, whoever writes to it.
const CONFLICT_PAUSE: Duration = Duration::from_millis(100);

/// How often the watch is tried again that the credential does not allow: rights may be granted meanwhile.
const FORBIDDEN_WATCH: Duration = Duration::from_secs(300);

/// Renews the Lease until the upkeep is stopped.
pub(super) async fn keep_lease(shared: Arc<Shared>) {
    let mut keeper = Keeper::new(shared.client.clone(), shared.name());
    let mut trouble = Trouble::new("renewing the Lease");
    let (mut stop, mut state) = (shared.stop.subscribe(), shared.state.subscribe());
    let mut renewed = Instant::now();
    let mut renewals = 0;
    while !*stop.borrow() {
        let uid = state.borrow_and_update().uid.clone();
        if !shared.is_taken() {
            match keeper.renew(&uid).await {
                Ok(found) => {
                    trouble.worked(shared.name());
                    // After such a gap the Node controller has given the Node up; see `status::given_up`.
                    if found == Found::Disturbed || renewed.elapsed() > DURATION {
                        shared.suspect_now();
                    }
                    renewed = Instant::now();
                }
                Err(error) => trouble.failed(shared.name(), &error),
            }
        }
        renewals += 1;
        tokio::select! {
            () = tokio::time::sleep(next_renewal(renewals)) => {}
            // A new uid: the Lease must be owned by the new Node. The sender lives in `shared`.
            _ = state.changed() => {}
            _ = stop.changed() => {}
        }
    }
}

/// Watches the Node: its deletion, another pilot's hand on it, and the Node controller's verdict.
pub(super) async fn keep_watch(shared: Arc<Shared>) {
    let mut stop = shared.stop.subscribe();
    let mut warned = false;
    while !*stop.borrow() {
        let mut events = watcher::watch_object(shared.nodes.clone(), shared.name()).default_backoff().boxed();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                _ = stop.changed() => return,
            };
            match event {
                Some(Ok(Some(node))) => look(&shared, &node).await,
                Some(Ok(None)) => shared.suspect_now(),
                Some(Err(error)) if is_forbidden(&error) => {
                    if !warned {
                        let node = shared.name();
                        tracing::warn!(node, %error, "this credential may not watch the Node; its deletion is noticed up to 10 s later");
                    }
                    warned = true;
                    break;
                }
                Some(Err(error)) => {
                    tracing::debug!(node = shared.name(), %error, "the watch of the Node broke")
                }
                None => break,
            }
        }
        tokio::select! {
            () = tokio::time::sleep(FORBIDDEN_WATCH) => {}
            _ = stop.changed() => {}
        }
    }
}

fn is_forbidden(error: &watcher::Error) -> bool {
    let kube::Error::Api(status) = (match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        _ => return false,
    }) else {
        return false;
    };
    status.code == 403
}

/// Compares what the API server has with what it should have.
async fn look(shared: &Shared, node: &Node) {
    if !still_ours(node, &shared.uid(), &shared.config.instance) || super::api::uid(node) != shared.uid() {
        shared.suspect_now();
        return;
    }
    shared.saw(node);
    let seen = observed(node);
    let wake = given_up(&seen);
    shared.writer.lock().await.observed = seen;
    if wake {
        shared.wake.notify_one();
    }
}

/// Writes labels, annotations and status when they are due, until the upkeep is stopped.
pub(super) async fn keep_node(shared: Arc<Shared>) {
    let mut stop = shared.stop.subscribe();
    let mut timing = shared.timing.clone();
    let mut followed = true;
    while !*stop.borrow() {
        timing.mark_unchanged();
        let wait = turn(&shared).await;
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.wake.notified() => {}
            moved = timing.changed(), if followed => followed = moved.is_ok(),
            _ = stop.changed() => {}
        }
    }
}

/// Does what is due, and says after how long to look again.
async fn turn(shared: &Shared) -> Duration {
    if shared.is_taken() {
        return LONGEST_WAIT;
    }
    let mut writer = shared.writer.lock().await;
    if shared.suspect.swap(false, Ordering::Relaxed) {
        drop(writer);
        if let Err(error) = recheck(shared).await {
            shared.suspect.store(true, Ordering::Relaxed);
            let mut writer = shared.writer.lock().await;
            writer.trouble.failed(shared.name(), &error);
            return retry_after(writer.trouble.failures());
        }
        if shared.is_taken() {
            return LONGEST_WAIT;
        }
        writer = shared.writer.lock().await;
    }
    let (now, timing) = (SystemTime::now(), shared.timing_now());
    let publish = shared.config.publish_walltime;
    let plan = plan(now, timing.as_ref(), publish, writer.published.as_ref(), shared.part);
    let health = shared.health().clone();
    let due = status_due(&writer, &health, matches!(plan, Plan::Write(_)), Instant::now(), shared.part);
    let published = match (plan, due, writer.published) {
        (Plan::Wait(wait), false, _) => return wait,
        (Plan::Write(value), ..) => Published { timing, value, at: now },
        // The label goes along as it is: what was true when it was written still is until its refresh.
        (Plan::Wait(_), true, last) => last.unwrap_or_else(|| shared.fresh(now)),
    };
    match write(shared, &mut writer, published, due.then_some(health)).await {
        Ok(()) => Duration::ZERO, // The next plan says how long to wait.
        Err(error) if error.kind() == Kind::Conflict => {
            // Somebody else wrote to the Node, as the Node controller does: look, and write again.
            tracing::debug!(node = shared.name(), %error, "the Node is another version than was thought");
            shared.suspect.store(true, Ordering::Relaxed);
            CONFLICT_PAUSE
        }
        Err(error) => {
            if matches!(error.kind(), Kind::NotFound | Kind::Invalid) {
                shared.suspect.store(true, Ordering::Relaxed);
            }
            writer.trouble.failed(shared.name(), &error);
            retry_after(writer.trouble.failures())
        }
    }
}

/// Whether the status must be written: it changed, the Node controller has given the Node up, or it is old.
fn status_due(writer: &Writer, health: &Health, label_due: bool, now: Instant, part: Part) -> bool {
    let Some((sent, at)) = &writer.status else { return true };
    let age = now.saturating_duration_since(*at);
    sent != health || given_up(&writer.observed) || is_old(age, label_due, part)
}

/// One write of the Node: labels and annotations, and the status with them where `health` is given.
pub(super) async fn write(
    shared: &Shared,
    writer: &mut Writer,
    published: Published,
    health: Option<Health>,
) -> Result<(), CallError> {
    let (name, expected, params) = (shared.name(), shared.expected(), PatchParams::default());
    let moment = shared.moment(published.timing.as_ref(), published.value);
    let node = match &health {
        Some(health) => {
            let made = conditions(&writer.observed, health, Timestamp::now());
            let patch =
                upkeep_patch(&shared.config, &expected, &moment, Some(&status(&shared.config, health, made)));
            call(shared.nodes.patch_status(name, &params, &Patch::Strategic(&patch))).await?
        }
        None => {
            let patch = upkeep_patch(&shared.config, &expected, &moment, None);
            call(shared.nodes.patch(name, &params, &Patch::Merge(&patch))).await?
        }
    };
    shared.saw(&node);
    writer.trouble.worked(name);
    announce(name, writer.published.and_then(|p| p.timing), published.timing);
    writer.published = Some(published);
    writer.observed = observed(&node);
    if let Some(health) = health {
        writer.status = Some((health, Instant::now()));
    }
    Ok(())
}

fn announce(node: &str, before: Option<Timing>, after: Option<Timing>) {
    if before != after {
        let seconds = |t: Timing| super::alivetime::whole_seconds(t.drain);
        tracing::info!(node, drain = after.map(seconds), "published the end anew");
    }
}

/// Reads the Node because it may be gone or another's: registers it again, or gives it up.
async fn recheck(shared: &Shared) -> Result<(), CallError> {
    if reread(shared).await? {
        return Ok(());
    }
    let (node, published, health) = shared.post().await?;
    tracing::warn!(
        node = shared.name(),
        uid = super::api::uid(&node),
        "the Node was deleted; it is registered again"
    );
    shared.record(&node, published, health).await;
    Ok(())
}

/// Reads the Node because it may be gone or another's; whether it is there. One that is another's is given up.
pub(super) async fn reread(shared: &Shared) -> Result<bool, CallError> {
    let Some(node) = call(shared.nodes.get_opt(shared.name())).await? else { return Ok(false) };
    if !still_ours(&node, &shared.uid(), &shared.config.instance) {
        let by =
            node.metadata.annotations.as_ref().and_then(|a| a.get(INSTANCE)).cloned().unwrap_or_default();
        tracing::error!(
            node = shared.name(),
            instance = by,
            "another has taken this Node over; this pilot writes to it no more, and its pods cannot be reported"
        );
        shared.state.send_modify(|state| state.taken_by = Some(by));
        return Ok(true);
    }
    let uid = super::api::uid(&node);
    shared.saw(&node);
    let mut writer = shared.writer.lock().await;
    writer.observed = observed(&node);
    if uid != shared.uid() {
        // Ours, by another uid: the answer to a registration was lost. Everything is written anew.
        (writer.published, writer.status) = (None, None);
        shared.state.send_modify(|state| state.uid = uid);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::NodeCondition;

    fn writer(age: Duration, now: Instant) -> Writer {
        Writer {
            published: None,
            observed: Vec::new(),
            status: now.checked_sub(age).map(|at| (Health::default(), at)),
            trouble: Trouble::new("a test"),
        }
    }

    #[test]
    fn the_status_is_written_on_change_and_every_five_minutes() {
        let now = Instant::now() + Duration::from_secs(1000);
        let secs = Duration::from_secs;
        let healthy = Health::default();
        for (age, label_due, want) in [
            (0, false, false),
            (239, true, false),
            (240, true, true),
            (299, false, false),
            (300, false, true),
        ] {
            assert_eq!(
                status_due(&writer(secs(age), now), &healthy, label_due, now, Part::ALL),
                want,
                "{age} {label_due}"
            );
        }
        let ill = Health { disk_pressure: true, ..Health::default() };
        assert!(status_due(&writer(secs(1), now), &ill, false, now, Part::ALL));
        let never = Writer { status: None, ..writer(secs(1), now) };
        assert!(status_due(&never, &healthy, false, now, Part::ALL));
    }

    #[test]
    fn a_node_that_was_given_up_says_that_it_is_there() {
        let now = Instant::now();
        let unknown =
            NodeCondition { type_: "Ready".into(), status: "Unknown".into(), ..NodeCondition::default() };
        let given_up = Writer { observed: vec![unknown], ..writer(Duration::ZERO, now) };
        assert!(status_due(&given_up, &Health::default(), false, now, Part::ALL));
    }
}
