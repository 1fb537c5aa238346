#!/bin/bash
# One pilot on one node:  sbatch slurm/pilot.sh
# Copy it, change the settings, or override any of them at submission: sbatch --time=4:00:00 pilot.sh
# Many of them: sbatch --array=1-8 pilot.sh, each task a pilot and a Node of its own; 1-100%8 runs eight at a
# time. One after another: pilot-chain.sh.

#SBATCH --job-name=jiriaf-pilot
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=1:00:00
#SBATCH --output=jiriaf-pilot-%j.out
# B: the batch script alone, which is the pilot after `exec`. 180 s: a time before the limit at which the
# pilot asks Slurm once more how long it has; JIRIAF_SIGNAL_LEAD below says the same number.
#SBATCH --signal=B:USR1@180

# First of all commands: when --time is shorter than the lead, Slurm sends USR1 one second after the start,
# and bash would die of it. The pilot sets its own handler.
trap '' USR1

# --- settings; what is already in the environment at submission holds ----------------------------------
# A site's settings file (docs/examples/site.toml). What is set here goes before what stands in it.
#export JIRIAF_CONFIG=${JIRIAF_CONFIG:-/etc/jiriaf/site.toml}
# The cluster to join; unset: ~/.kube/config. What its users select the node by; unset: Slurm's cluster.
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
# The number in --signal above.
export JIRIAF_SIGNAL_LEAD=${JIRIAF_SIGNAL_LEAD:-180}
# The binary: a path, or a name in PATH.
pilot=${JIRIAF_PILOT:-jiriaf-pilot}
# --------------------------------------------------------------------------------------------------------

# exec: Slurm sends SIGTERM and USR1 to this process alone, not to its children.
exec "$pilot" run
