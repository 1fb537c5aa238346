//! New namespaces, entering those of a container, and the capabilities that are needed for it and given up again.

use std::fs::{self, File};
use std::io;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getegid, geteuid, sethostname};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    configure_capability_in_ambient_set, set_capabilities, set_capabilities_secure_bits,
};

use super::super::protocol::{StartError, View};
use super::other;

/// What a host may have set, where it refuses.
pub(super) const REFUSED: &str = "does this host permit unprivileged user namespaces (sysctl user.max_user_namespaces, \
     kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)?";

/// Gives this process, which has one thread, user, mount and UTS namespaces of its own, and its children a PID namespace. Its
/// user and group stay what they are, or have the view's numbers. The capability to mount lasts over the next exec, which is
/// init's. Where the view has a hostname, it is the host's name from now on.
pub(in super::super) fn separate(view: &View) -> Result<(), StartError> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let (user, group) = view.ids.unwrap_or((uid, gid));
    // The files of a process that is not dumpable are root's (proc(5)), and a file that one may not read makes such.
    let _ = nix::sys::prctl::set_dumpable(true);
    let flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS;
    unshare(flags)
        .map_err(|errno| other("making namespaces", &format_args!("{}; {REFUSED}", errno.desc())))?;
    // Without it an unprivileged user may not map a group (user_namespaces(7)); kernels before 3.19 have no such file.
    match fs::write("/proc/self/setgroups", "deny") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(other("writing /proc/self/setgroups", &error));
        }
        _ => {}
    }
    for (file, inside, outside) in [("uid_map", user, uid), ("gid_map", group, gid)] {
        let path = format!("/proc/self/{file}");
        fs::write(&path, format!("{inside} {outside} 1"))
            .map_err(|error| other(&format!("writing {path}"), &format_args!("{error}; {REFUSED}")))?;
    }
    if let Some(name) = &view.hostname {
        sethostname(name.as_str())
            .map_err(|errno| other(&format!("setting the hostname {name:?}"), &errno.desc()))?;
    }
    keep_mounting().map_err(|error| other("keeping the capability to mount", &error))
}

/// exec takes all capabilities from a user that is not root, but ambient ones (capabilities(7)).
fn keep_mounting() -> rustix::io::Result<()> {
    let mut sets = capabilities(None)?;
    sets.inheritable |= CapabilitySet::SYS_ADMIN;
    set_capabilities(None, sets)?;
    configure_capability_in_ambient_set(CapabilitySet::SYS_ADMIN, true)
}

/// Gives all capabilities up, for what is executed from here on too: also where the user is root, whom exec would give
/// them anew.
pub(in super::super) fn give_capabilities_up() -> Result<(), StartError> {
    let none = CapabilitySet::empty();
    let give_up = || {
        if geteuid().is_root() {
            let bits = CapabilitiesSecureBits::NO_ROOT | CapabilitiesSecureBits::NO_ROOT_LOCKED;
            set_capabilities_secure_bits(bits)?;
        }
        clear_ambient_capability_set()?;
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
    };
    give_up().map_err(|error| other("giving capabilities up", &error))
}

/// Enters the namespaces of a container's first process; the PID namespace is that of children from then on.
pub(in super::super) fn enter(init: i32) -> Result<(), StartError> {
    let failed = |what: &str, problem: &dyn std::fmt::Display| {
        other("entering the container's namespaces", &format_args!("{what}: {problem}"))
    };
    let mut opened = Vec::new();
    // All are opened first: in the container's mount namespace this process has no /proc of its own.
    for (name, flag) in [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("mnt", CloneFlags::CLONE_NEWNS),
        ("pid", CloneFlags::CLONE_NEWPID),
    ] {
        let file = File::open(format!("/proc/{init}/ns/{name}")).map_err(|error| failed(name, &error))?;
        opened.push((name, flag, file));
    }
    for (name, flag, file) in opened {
        setns(&file, flag).map_err(|errno: Errno| failed(name, &errno.desc()))?;
    }
    Ok(())
}
