//! What a `securityContext` asks of a process node: refused where leaving it out would break silently what the Pod counts
//! on, honoured where an unprivileged user can, ignored where nothing comes of it.
//!
//! Pure; admission asks [`check`]. docs/reference-pod.md has the list of all fields.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext, PodSpec, SecurityContext};

use super::containers;

/// Who the pilot is: its containers are the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Us {
    /// User id.
    pub user: u32,
    /// Group id.
    pub group: u32,
    /// All groups, that one among them.
    pub groups: BTreeSet<u32>,
    /// Whether this host has SELinux: elsewhere labels mean nothing, and a kubelet passes them over too.
    pub selinux: bool,
}

impl Us {
    /// This process.
    #[must_use]
    pub fn now() -> &'static Self {
        static US: OnceLock<Us> = OnceLock::new();
        US.get_or_init(|| {
            let group = nix::unistd::getegid().as_raw();
            let others = nix::unistd::getgroups().unwrap_or_default();
            Us {
                user: nix::unistd::geteuid().as_raw(),
                group,
                groups: others.into_iter().map(nix::unistd::Gid::as_raw).chain([group]).collect(),
                selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            }
        })
    }
}

/// A field that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value} is not supported by jiriaf-pilot: {problem}")]
pub struct Unsupported {
    field: String,
    value: String,
    problem: String,
}

/// Whether everything that a pod's securityContexts ask for is honoured or harmless. Containers that are `isolated` see the
/// pilot's own user and group under whatever numbers they ask for ([`ids`]).
///
/// # Errors
/// The first field that is neither.
pub fn check(spec: &PodSpec, us: &Us, isolated: bool) -> Result<(), Unsupported> {
    if spec.host_users == Some(false) {
        return refused(
            "spec.hostUsers",
            "false",
            "containers are processes of the allocation's owner; leave it out, or run the pod on another node",
        );
    }
    let none = PodSecurityContext::default();
    let pod = spec.security_context.as_ref().unwrap_or(&none);
    of_pod(pod, us, isolated)?;
    let mut index = std::collections::BTreeMap::new();
    for (kind, container) in containers::all(spec) {
        let number = index.entry(kind.field()).or_insert(0);
        let field = format!("spec.{}[{number}].securityContext", kind.field());
        *number += 1;
        let none = SecurityContext::default();
        of_container(&field, container.security_context.as_ref().unwrap_or(&none), pod, us, isolated)?;
    }
    Ok(())
}

fn refused(
    field: &str,
    value: impl std::fmt::Display,
    problem: impl Into<String>,
) -> Result<(), Unsupported> {
    Err(Unsupported { field: field.to_owned(), value: value.to_string(), problem: problem.into() })
}

const SELINUX: &str = "labels of processes are the host's to give; leave it out";
const WINDOWS: &str = "this is a Linux node; leave it out";
const PROFILE: &str = "no profile of the node's is put upon a process; use RuntimeDefault, or leave it out";

fn of_pod(pod: &PodSecurityContext, us: &Us, isolated: bool) -> Result<(), Unsupported> {
    let field = |name: &str| format!("spec.securityContext.{name}");
    if us.selinux && pod.se_linux_options.as_ref().is_some_and(|options| *options != Default::default()) {
        return refused(&field("seLinuxOptions"), "set", SELINUX);
    }
    if pod.windows_options.is_some() {
        return refused(&field("windowsOptions"), "set", WINDOWS);
    }
    if let Some(first) = pod.sysctls.iter().flatten().next() {
        let problem = "the kernel's settings are the host's; leave it out, or ask the site";
        return refused(&field("sysctls"), &first.name, problem);
    }
    let ours = |group: i64| u32::try_from(group).is_ok_and(|group| us.groups.contains(&group));
    let groups = || us.groups.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let problem = || format!("the pilot is in the groups {}: use one of these, or leave it out", groups());
    // One group has one number in a user namespace: the one that is asked for, not two.
    let numbered = |group: i64| isolated && pod.run_as_group.is_none_or(|other| other == group);
    if let Some(group) = pod.fs_group.filter(|group| !ours(*group) && !numbered(*group)) {
        return refused(&field("fsGroup"), group, problem());
    }
    if let Some(group) = pod.supplemental_groups.iter().flatten().find(|group| !ours(**group)) {
        return refused(&field("supplementalGroups"), group, problem());
    }
    if pod.supplemental_groups_policy.as_deref() == Some("Strict") {
        let problem = "a process keeps all groups of the allocation's owner; use Merge, or leave it out";
        return refused(&field("supplementalGroupsPolicy"), "Strict", problem);
    }
    profiles(
        "spec.securityContext",
        pod.seccomp_profile.as_ref().map(|profile| profile.type_.as_str()),
        pod.app_armor_profile.as_ref().map(|profile| profile.type_.as_str()),
    )
}

fn of_container(
    field: &str,
    own: &SecurityContext,
    pod: &PodSecurityContext,
    us: &Us,
    isolated: bool,
) -> Result<(), Unsupported> {
    // What a container says counts before what its pod says (pkg/securitycontext/util.go).
    let place = |own: bool, name: &str| {
        if own { format!("{field}.{name}") } else { format!("spec.securityContext.{name}") }
    };
    let foreign = |id: &i64, ours: u32| !isolated && *id != i64::from(ours);
    if let Some(user) = own.run_as_user.or(pod.run_as_user).filter(|user| foreign(user, us.user)) {
        let problem = format!(
            "containers run as the pilot does, user id {}: leave it out, or let the pod be isolated (--isolation), where the \
             pilot's user has the number that is asked for",
            us.user
        );
        return refused(&place(own.run_as_user.is_some(), "runAsUser"), user, problem);
    }
    if let Some(group) = own.run_as_group.or(pod.run_as_group).filter(|group| foreign(group, us.group)) {
        let problem = format!(
            "containers run as the pilot does, group id {}: leave it out, or let the pod be isolated (--isolation)",
            us.group
        );
        return refused(&place(own.run_as_group.is_some(), "runAsGroup"), group, problem);
    }
    let user = own.run_as_user.or(pod.run_as_user).unwrap_or(i64::from(us.user));
    if own.run_as_non_root.or(pod.run_as_non_root) == Some(true) && user == 0 {
        let problem = "it would run as root: start the pilot as another user, or give a runAsUser";
        return refused(&place(own.run_as_non_root.is_some(), "runAsNonRoot"), true, problem);
    }
    if own.privileged == Some(true) {
        let problem = "containers have the rights of the allocation's owner, no others; leave it out";
        return refused(&format!("{field}.privileged"), true, problem);
    }
    if let Some(first) = own.capabilities.iter().flat_map(|c| c.add.iter().flatten()).next() {
        let problem = "no capability can be given to a process of an ordinary user; leave it out";
        return refused(&format!("{field}.capabilities.add"), first, problem);
    }
    if us.selinux && own.se_linux_options.as_ref().is_some_and(|options| *options != Default::default()) {
        return refused(&format!("{field}.seLinuxOptions"), "set", SELINUX);
    }
    if own.windows_options.is_some() {
        return refused(&format!("{field}.windowsOptions"), "set", WINDOWS);
    }
    if let Some(mount) = own.proc_mount.as_deref().filter(|mount| !matches!(*mount, "" | "Default")) {
        return refused(&format!("{field}.procMount"), mount, "/proc is the host's; leave it out");
    }
    profiles(
        field,
        own.seccomp_profile.as_ref().map(|profile| profile.type_.as_str()),
        own.app_armor_profile.as_ref().map(|profile| profile.type_.as_str()),
    )
}

/// RuntimeDefault and Unconfined come to nothing here: there is no runtime whose default it could be. A profile of the
/// node's own was asked for by name.
fn profiles(field: &str, seccomp: Option<&str>, app_armor: Option<&str>) -> Result<(), Unsupported> {
    for (name, kind) in [("seccompProfile", seccomp), ("appArmorProfile", app_armor)] {
        if kind == Some("Localhost") {
            return refused(&format!("{field}.{name}.type"), "Localhost", PROFILE);
        }
    }
    Ok(())
}

/// The group that the files of a pod's volumes are to have, where it asks for one: of the pilot's own groups. One that is
/// none of them has its number in the containers' namespaces alone, and is the pilot's own outside.
#[must_use]
pub fn fs_group(pod: &Pod) -> Option<u32> {
    let us = Us::now();
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    let group = u32::try_from(group).ok()?;
    Some(if us.groups.contains(&group) { group } else { us.group })
}

/// The numbers of a container's user and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// The user's.
    pub user: u32,
    /// The group's.
    pub group: u32,
}

/// Under which numbers an isolated container sees the pilot's own user and group: `runAsUser`, and `runAsGroup` or a foreign
/// `fsGroup`; else they keep their own.
#[must_use]
pub fn ids(pod: &Pod, container: &Container, us: &Us) -> Ids {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.security_context.clone()).unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let number = |id: Option<i64>| id.and_then(|id| u32::try_from(id).ok());
    let foreign = number(of_pod.fs_group).filter(|group| !us.groups.contains(group));
    Ids {
        user: number(own.run_as_user.or(of_pod.run_as_user)).unwrap_or(us.user),
        group: number(own.run_as_group.or(of_pod.run_as_group)).or(foreign).unwrap_or(us.group),
    }
}

/// The user that all containers of a pod name (pkg/volume/util/util.go, FsUserFrom).
#[must_use]
pub fn fs_user(pod: &Pod) -> Option<i64> {
    let spec = pod.spec.as_ref()?;
    let whole = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = containers::all(spec).map(|(_, container)| {
        container.security_context.as_ref().and_then(|context| context.run_as_user).or(whole)
    });
    let first = users.next()??;
    users.all(|user| user == Some(first)).then_some(first)
}

/// Whether a container's programs may never have more rights than they begin with (pkg/securitycontext/util.go,
/// AddNoNewPrivileges).
#[must_use]
pub fn no_new_privs(container: &Container) -> bool {
    container.security_context.as_ref().and_then(|context| context.allow_privilege_escalation) == Some(false)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    fn us() -> Us {
        Us { user: 1001, group: 100, groups: [100, 2000].into(), selinux: true }
    }

    fn spec(pod: Value, container: Value) -> PodSpec {
        let mut spec = json!({"containers": [{"name": "a"}, {"name": "b", "securityContext": container}]});
        spec["securityContext"] = pod;
        from_value(spec).unwrap()
    }

    #[test]
    fn an_isolated_container_has_the_numbers_that_it_asks_for() {
        let pod = |pod: Value, container: Value| -> Pod {
            let mut all: Pod = from_value(json!({"metadata": {}})).unwrap();
            all.spec = Some(spec(pod, container));
            all
        };
        let cases = [
            (json!({}), json!({}), (1001, 100)),
            (json!({"runAsUser": 5, "runAsGroup": 6}), json!({}), (5, 6)),
            (json!({"runAsUser": 5}), json!({"runAsUser": 0}), (0, 100)),
            (json!({"fsGroup": 7}), json!({}), (1001, 7)),
            (json!({"fsGroup": 2000}), json!({}), (1001, 100)),
            (json!({"fsGroup": 7, "runAsGroup": 7}), json!({}), (1001, 7)),
        ];
        for (of_pod, own, (user, group)) in cases {
            let pod = pod(of_pod, own);
            let (_, container) = containers::find(&pod, "b").unwrap();
            assert_eq!(ids(&pod, &container, &us()), Ids { user, group }, "{pod:?}");
            assert_eq!(check(pod.spec.as_ref().unwrap(), &us(), true), Ok(()), "{pod:?}");
        }
        for (of_pod, own) in [
            (json!({"fsGroup": 7, "runAsGroup": 8}), json!({})),
            (json!({"supplementalGroups": [7]}), json!({})),
            (json!({"runAsNonRoot": true, "runAsUser": 0}), json!({})),
            (json!({"runAsUser": 5}), json!({"privileged": true})),
        ] {
            assert!(check(&spec(of_pod.clone(), own), &us(), true).is_err(), "{of_pod}");
        }
    }

    #[test]
    fn what_is_harmless_or_honoured_is_admitted() {
        for (pod, container) in [
            (json!({}), json!({})),
            (json!({"runAsUser": 1001, "runAsGroup": 100, "runAsNonRoot": true}), json!({})),
            (
                json!({"fsGroup": 2000, "supplementalGroups": [100, 2000], "supplementalGroupsPolicy": "Merge"}),
                json!({}),
            ),
            (
                json!({"fsGroupChangePolicy": "OnRootMismatch", "seLinuxChangePolicy": "MountOption"}),
                json!({}),
            ),
            (
                json!({"seccompProfile": {"type": "RuntimeDefault"}, "appArmorProfile": {"type": "Unconfined"}}),
                json!({}),
            ),
            (json!({"seLinuxOptions": {}}), json!({"seLinuxOptions": {}})),
            (json!({"sysctls": [], "supplementalGroups": []}), json!({})),
            (
                json!({}),
                json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "privileged": false}),
            ),
            (json!({}), json!({"capabilities": {"drop": ["ALL"]}, "procMount": "Default"})),
            (json!({}), json!({"seccompProfile": {"type": "Unconfined"}})),
        ] {
            assert_eq!(
                check(&spec(pod.clone(), container.clone()), &us(), false),
                Ok(()),
                "{pod} {container}"
            );
        }
        // Each container says otherwise.
        let overridden = json!({"securityContext": {"runAsUser": 0}, "containers": [
            {"name": "a", "securityContext": {"runAsUser": 1001}}]});
        assert_eq!(check(&from_value(overridden).unwrap(), &us(), false), Ok(()));
        let root = Us { user: 0, group: 0, groups: [0].into(), selinux: true };
        assert_eq!(
            check(&spec(json!({"runAsUser": 0}), json!({"runAsNonRoot": false})), &root, false),
            Ok(())
        );
    }

    #[test]
    fn what_would_be_broken_silently_is_refused_by_name() {
        for (pod, container, wanted) in [
            (json!({"runAsUser": 1000}), json!({}), "spec.securityContext.runAsUser: 1000"),
            (
                json!({"runAsUser": 1001}),
                json!({"runAsUser": 0}),
                "spec.containers[1].securityContext.runAsUser: 0",
            ),
            (json!({"runAsGroup": 0}), json!({}), "spec.securityContext.runAsGroup: 0"),
            (json!({"fsGroup": 5}), json!({}), "spec.securityContext.fsGroup: 5"),
            (
                json!({"supplementalGroups": [100, 5]}),
                json!({}),
                "spec.securityContext.supplementalGroups: 5",
            ),
            (json!({"supplementalGroupsPolicy": "Strict"}), json!({}), "supplementalGroupsPolicy: Strict"),
            (
                json!({"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]}),
                json!({}),
                "sysctls: kernel.shm_rmid_forced",
            ),
            (
                json!({"seLinuxOptions": {"level": "s0"}}),
                json!({}),
                "spec.securityContext.seLinuxOptions: set",
            ),
            (json!({"windowsOptions": {}}), json!({}), "spec.securityContext.windowsOptions"),
            (
                json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "p"}}),
                json!({}),
                "spec.securityContext.seccompProfile.type: Localhost",
            ),
            (json!({}), json!({"privileged": true}), "spec.containers[1].securityContext.privileged: true"),
            (json!({}), json!({"capabilities": {"add": ["NET_ADMIN"]}}), "capabilities.add: NET_ADMIN"),
            (json!({}), json!({"procMount": "Unmasked"}), "procMount: Unmasked"),
            (
                json!({}),
                json!({"seLinuxOptions": {"level": "s0"}}),
                "spec.containers[1].securityContext.seLinuxOptions",
            ),
            (json!({}), json!({"windowsOptions": {}}), "spec.containers[1].securityContext.windowsOptions"),
            (
                json!({}),
                json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "p"}}),
                "appArmorProfile.type: Localhost",
            ),
        ] {
            let error = check(&spec(pod, container), &us(), false).expect_err(wanted).to_string();
            assert!(
                error.contains(wanted) && error.contains("is not supported by jiriaf-pilot: "),
                "{error}"
            );
        }
        let root = Us { user: 0, group: 0, groups: [0].into(), selinux: true };
        let error =
            check(&spec(json!({"runAsNonRoot": true}), json!({})), &root, false).unwrap_err().to_string();
        assert!(error.contains("spec.securityContext.runAsNonRoot: true"), "{error}");
        let users: PodSpec = from_value(json!({"hostUsers": false, "containers": []})).unwrap();
        assert!(check(&users, &us(), false).unwrap_err().to_string().contains("spec.hostUsers: false"));
        let init = json!({"containers": [], "initContainers": [{"name": "i", "securityContext": {"privileged": true}}]});
        let error = check(&from_value(init).unwrap(), &us(), false).unwrap_err().to_string();
        assert!(error.starts_with("spec.initContainers[0].securityContext.privileged"), "{error}");
    }

    #[test]
    fn the_user_of_a_pods_volumes_is_the_one_that_all_name() {
        let user = |spec: Value| fs_user(&from_value(json!({"metadata": {}, "spec": spec})).unwrap());
        assert_eq!(user(json!({"containers": [{"name": "a"}]})), None);
        assert_eq!(
            user(json!({"securityContext": {"runAsUser": 7}, "containers": [{"name": "a"}]})),
            Some(7)
        );
        let own = json!([{"name": "a", "securityContext": {"runAsUser": 7}}, {"name": "b"}]);
        assert_eq!(user(json!({"containers": own})), None);
        assert_eq!(user(json!({"securityContext": {"runAsUser": 7}, "containers": own})), Some(7));
    }
}
