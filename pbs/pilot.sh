#!/bin/bash
# One pilot on each host of a PBS job:  qsub pbs/pilot.sh, or better: pbs/qsub-pilot, which also hands your
# settings over. Copy it, change the settings, or override any #PBS line at submission.

#PBS -N jiriaf-pilot
#PBS -j oe
# mpiprocs=1 and place=scatter: each host is once in the job's list of hosts, so it gets one pilot.
# mem last: Slurm, which reads these lines too, takes what follows it up to the comma for its value.
#PBS -l select=1:ncpus=2:mpiprocs=1:mem=2gb,place=scatter,walltime=01:00:00

# What pbs/qsub-pilot wrote down at submission. Only the path is in the job's environment, which qstat shows
# to everyone.
# shellcheck source=/dev/null
[ -z "${JIRIAF_SETTINGS:-}" ] || . "$JIRIAF_SETTINGS" || exit 1

# --- settings; what is already in the environment or in the settings file holds ------------------------
# The cluster to join, and what its users select the node by.
export KUBECONFIG=${KUBECONFIG:-$HOME/.kube/config}
export JIRIAF_SITE=${JIRIAF_SITE:-pbs}
# cpu or gpu; unset: found out.
#export JIRIAF_NODETYPE=cpu
# The namespaces whose pods may run as you; unset: all.
#export JIRIAF_NAMESPACES=my-team
# Leave, and give the nodes back, when no pod has run for so long, or none has come; unset: never.
#export JIRIAF_IDLE_TIMEOUT=15m JIRIAF_IDLE_TIMEOUT_FIRST=30m
# Where pods have their directories, $HOME/p1 for a pod p1. Where $HOME is small, or read-only on compute
# nodes, name the site's scratch, such as $SCRATCH or /scratch/$LOGNAME.
export JIRIAF_PODS_DIR=${JIRIAF_PODS_DIR:-$HOME}
# The binary: a path that all hosts see, or a name in PATH.
export JIRIAF_PILOT=${JIRIAF_PILOT:-jiriaf-pilot}
# --------------------------------------------------------------------------------------------------------

if [ ! -f "${PBS_NODEFILE:-}" ] || [ "$(sort -u "$PBS_NODEFILE" | wc -l)" -le 1 ]; then
    # exec: one process fewer between PBS and the pilot.
    exec "$JIRIAF_PILOT" run
fi

# Several hosts. pbsdsh gives its tasks next to no environment, so they read this job's from a file that
# nobody else can read.
environment=$(umask 077 && mktemp "$HOME/.jiriaf-pilot-env.XXXXXX") || exit 1
trap 'rm -f "$environment"' EXIT
export -p >"$environment"

# PBS ends what runs on the other hosts as soon as nothing runs here: on SIGTERM stay, and wait.
terminated=
trap 'terminated=yes' TERM
# What pbsdsh gave each task alone is kept: its number, its host's number, its host's directory.
# shellcheck disable=SC2016 # expanded by the task
pbsdsh -- /bin/bash -c 'node=$PBS_NODENUM task=$PBS_TASKNUM tmp=${TMPDIR:-/tmp}; . "$1" || exit 1
    export PBS_NODENUM=$node PBS_TASKNUM=$task TMPDIR=$tmp; exec "$JIRIAF_PILOT" run' pilot "$environment" &
# A trapped signal ends `wait`, so wait again until pbsdsh is gone.
wait $!; status=$?
while kill -0 $! 2>/dev/null; do wait $!; status=$?; done
# pbsdsh got the SIGTERM too. Should it have died of it, the pilots still need this process: PBS itself ends
# the wait, with SIGKILL, kill_delay (10 s, or what the queue says) after its SIGTERM.
[ -z "$terminated" ] || [ "$status" -le 128 ] || { sleep 60 & wait; }
exit "$status"
