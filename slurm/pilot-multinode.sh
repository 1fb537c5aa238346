#!/bin/bash
# One pilot on each of several nodes:  sbatch --nodes=4 slurm/pilot-multinode.sh
# Copy it, change the settings, or override any of them at submission.

#SBATCH --job-name=jiriaf-pilots
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=1:00:00
#SBATCH --output=jiriaf-pilots-%j.out
# No B: here: the signal must reach the pilots, which are srun's tasks. 180 s: a time before the limit at
# which they ask Slurm once more how long they have; JIRIAF_SIGNAL_LEAD below says the same number.
#SBATCH --signal=USR1@180

# First of all commands: when --time is shorter than the lead, Slurm sends USR1 one second after the start,
# and whatever has no handler yet would die of it.
trap '' USR1

# --- settings; what is already in the environment at submission holds ----------------------------------
# A site's settings file (docs/examples/site.toml). What is set here goes before what stands in it.
#export JIRIAF_CONFIG=${JIRIAF_CONFIG:-/etc/jiriaf/site.toml}
# The cluster to join; unset: ~/.kube/config. What its users select the nodes by; unset: Slurm's cluster.
#export KUBECONFIG=${KUBECONFIG:-$HOME/pilot.kubeconfig}
#export JIRIAF_SITE=${JIRIAF_SITE:-mysite}
# cpu or gpu; unset: found out on each node.
#export JIRIAF_NODETYPE=cpu
# The namespaces whose pods may run as you; unset: all.
#export JIRIAF_NAMESPACES=my-team
# Leave, and give the nodes back, when no pod has run for so long, or none has come; unset: never.
#export JIRIAF_IDLE_TIMEOUT=15m JIRIAF_IDLE_TIMEOUT_FIRST=30m
# Where pods have their directories; unset: $HOME, $HOME/p1 for a pod p1. Where that is small, or read-only on
# compute nodes, name the site's scratch, such as $SCRATCH or /scratch/$LOGNAME.
#export JIRIAF_PODS_DIR=${JIRIAF_PODS_DIR:-/scratch/$LOGNAME}
# The number in --signal above.
export JIRIAF_SIGNAL_LEAD=${JIRIAF_SIGNAL_LEAD:-180}
# The binary: a path that all nodes see, or a name in PATH.
pilot=${JIRIAF_PILOT:-jiriaf-pilot}
# --------------------------------------------------------------------------------------------------------

options=(
    --nodes="$SLURM_JOB_NUM_NODES"
    --ntasks-per-node=1    # one pilot on each node
    --overlap              # an srun inside a pod finds the CPUs free
    --wait=0               # a pilot that ends leaves the others alone …
    --kill-on-bad-exit=0   # … and so does one that fails
    --cpu-bind=none        # a pilot may use all CPUs that the job has on its node
    --mpi=none             # a pilot is no MPI rank, and pods that are must not find themselves in its world
    --label                # each line of output says which pilot wrote it
)
# A heterogeneous job (sbatch … : … script): a pilot on each node of all its components.
if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    options[0]=--het-group=0-$((SLURM_HET_SIZE - 1))
fi
# exec: nothing is left for bash to do, and it would die of the SIGTERM that srun outlives.
# The tasks ignore USR1 as well until the pilot has its handler; Slurm starts them with defaults.
# shellcheck disable=SC2016 # expanded by the task
exec srun "${options[@]}" bash -c 'trap "" USR1; exec "$1" run' bash "$pilot"
