#!/bin/bash
# A chain of pilots on one node each, one after another:  slurm/pilot-chain.sh --time=4:00:00 --cpus-per-task=8
# Run it, do not submit it: it submits itself with the options of sbatch that it is given, and each job submits
# the next one as it starts, with the same options. `scancel --name=jiriaf-chain` ends the chain.
# Copy it, and change the settings.

#SBATCH --job-name=jiriaf-chain
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=1:00:00
#SBATCH --output=jiriaf-pilot-%j.out
# As in pilot.sh, which says why.
#SBATCH --signal=B:USR1@180
trap '' USR1

# --- settings; what is already in the environment at submission holds ----------------------------------
# How many jobs the chain has, and after how many seconds the next one may start at the earliest: a pilot that
# cannot run, with a token that has expired say, must not eat up the chain, or the hours.
links=${JIRIAF_LINKS:-50}
pause=${JIRIAF_PAUSE:-300}
# A site's settings file (docs/examples/site.toml). What is set here goes before what stands in it.
#export JIRIAF_CONFIG=${JIRIAF_CONFIG:-/etc/jiriaf/site.toml}
# The cluster to join; unset: ~/.kube/config. Its token must live as long as the chain.
#export KUBECONFIG=${KUBECONFIG:-$HOME/pilot.kubeconfig}
#export JIRIAF_SITE=${JIRIAF_SITE:-mysite}
#export JIRIAF_NAMESPACES=my-team
#export JIRIAF_PODS_DIR=${JIRIAF_PODS_DIR:-/scratch/$LOGNAME}
# The number in --signal above.
export JIRIAF_SIGNAL_LEAD=${JIRIAF_SIGNAL_LEAD:-180}
# The binary: a path, or a name in PATH.
pilot=${JIRIAF_PILOT:-jiriaf-pilot}
# --------------------------------------------------------------------------------------------------------

# link LEFT OPTION…: submits a job that is the chain's next, with so many left from it on. singleton: of a user's
# jobs of one name, one runs at a time.
link() {
    local left=$1
    shift
    sbatch --dependency=singleton "$@" "$0" --link "$left" "${options[@]}"
}
if [ "${1:-}" != --link ]; then
    options=("$@")
    link "$links" "$@"
    exit
fi
left=$2 options=("${@:3}")

if [ "${SLURM_JOB_NUM_NODES:-1}" != 1 ] || [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "pilot-chain.sh: a chain of jobs with one node each is wanted, not of arrays or of $SLURM_JOB_NUM_NODES nodes" >&2
    exit 2
fi
# A job that was requeued has submitted the next one before.
if [ "$left" -gt 1 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    link $((left - 1)) --begin="now+$pause" "${options[@]}" ||
        echo "pilot-chain.sh: the next job could not be submitted, and the chain ends with this one" >&2
fi

# exec: Slurm sends SIGTERM and USR1 to this process alone, not to its children.
exec "$pilot" run
