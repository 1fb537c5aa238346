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
# A site's settings file (docs/examples/site.toml). What is set here goes before what stands in it.
#export JIRIAF_CONFIG=${JIRIAF_CONFIG:-/etc/jiriaf/site.toml}
# The cluster to join; unset: ~/.kube/config. What its users select the node by; unset: PBS's server.
#export KUBECONFIG=${KUBECONFIG:-$HOME/pilot.kubeconfig}
#export JIRIAF_SITE=${JIRIAF_SITE:-mysite}
# cpu or gpu; unset: found out.
#export JIRIAF_NODETYPE=cpu
# The namespaces whose pods may run as you; unset: all.
#export JIRIAF_NAMESPACES=my-team
# Leave, and give the nodes back, when no pod has run for so long, or none has come; unset: never.
#export JIRIAF_IDLE_TIMEOUT=15m JIRIAF_IDLE_TIMEOUT_FIRST=30m
# Where pods have their directories; unset: $HOME, $HOME/p1 for a pod p1. Where that is small, or read-only on
# compute nodes, name the site's scratch, such as $SCRATCH or /scratch/$LOGNAME.
#export JIRIAF_PODS_DIR=${JIRIAF_PODS_DIR:-/scratch/$LOGNAME}
# The binary: a path that all hosts see, or a name in PATH.
export JIRIAF_PILOT=${JIRIAF_PILOT:-jiriaf-pilot}
# What starts the pilots of several hosts: pbsdsh, one for each line of the list of hosts; or pbs_tmrsh, one for
# each host that is in it, however often.
launch=${JIRIAF_LAUNCH:-pbsdsh}
# --------------------------------------------------------------------------------------------------------

if [ ! -f "${PBS_NODEFILE:-}" ] || [ "$(sort -u "$PBS_NODEFILE" | wc -l)" -le 1 ]; then
    # exec: one process fewer between PBS and the pilot.
    exec "$JIRIAF_PILOT" run
fi

case $launch in
pbsdsh | pbs_tmrsh) ;;
*) echo "JIRIAF_LAUNCH=$launch: pbsdsh or pbs_tmrsh is wanted" >&2 && exit 2 ;;
esac

# Several hosts. Both give their tasks next to no environment, so they read this job's from a file that nobody
# else can read.
environment=$(umask 077 && mktemp "$HOME/.jiriaf-pilot-env.XXXXXX") || exit 1
trap 'rm -f "$environment"' EXIT
export -p >"$environment"
# What each task was given alone is kept: its number, its host's number, its host's directory.
# shellcheck disable=SC2016 # expanded by the task
task='node=$PBS_NODENUM task=$PBS_TASKNUM tmp=${TMPDIR:-/tmp}; . "$1" || exit 1
    export PBS_NODENUM=$node PBS_TASKNUM=$task TMPDIR=$tmp; exec "$JIRIAF_PILOT" run'

# PBS ends what runs on the other hosts as soon as nothing runs here: on SIGTERM stay, and wait.
terminated=
trap 'terminated=yes' TERM
started=()
if [ "$launch" = pbsdsh ]; then
    pbsdsh -- /bin/bash -c "$task" pilot "$environment" &
    started+=($!)
else
    while read -r host; do
        pbs_tmrsh "$host" /bin/bash -c "$task" pilot "$environment" </dev/null &
        started+=($!)
    done < <(sort -u "$PBS_NODEFILE")
fi
# A trapped signal ends `wait`, so wait again until each is gone. The worst that one said counts; pbsdsh says
# nothing of its tasks but in words.
worst=0
for one in "${started[@]}"; do
    wait "$one"; status=$?
    while kill -0 "$one" 2>/dev/null; do wait "$one"; status=$?; done
    [ "$status" -le "$worst" ] || worst=$status
done
# They got the SIGTERM too. Should one have died of it, its pilot still needs this process: PBS itself ends the
# wait, with SIGKILL, kill_delay (10 s, or what the queue says) after its SIGTERM.
[ -z "$terminated" ] || [ "$worst" -le 128 ] || { sleep 60 & wait; }
exit "$worst"
