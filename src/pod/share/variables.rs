//! What programs are told of their share.

use std::collections::BTreeMap;

use super::{AMD, ContainerShare, INTEL, NVIDIA};

/// How many threads a library starts: OpenMP's, and those of libraries that do not always go by it.
const THREADS: [&str; 4] =
    ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"];

/// The variables by which a vendor's libraries see some of its GPUs, and what stands for none in each.
const VISIBLE: [(&str, &[(&str, &str)]); 3] = [
    // -1 is no GPU's number; `void` is the container toolkit's word.
    (NVIDIA, &[("CUDA_VISIBLE_DEVICES", "-1"), ("NVIDIA_VISIBLE_DEVICES", "void")]),
    (AMD, &[("ROCR_VISIBLE_DEVICES", "-1"), ("HIP_VISIBLE_DEVICES", "-1"), ("GPU_DEVICE_ORDINAL", "-1")]),
    // Numbers of devices that are not there are left out; nothing at all would mean all of them.
    (INTEL, &[("ZE_AFFINITY_MASK", "999")]),
];

/// What a container's environment begins with: the pod's own variables go before these.
///
/// `cpus` is how many it runs on, `share` what it has. `granted` are the GPUs of the job by their resource: of vendors that it has
/// none of nothing is said, but that none is there where a batch system's variable is `inherited`.
#[must_use]
pub fn variables(
    share: Option<&ContainerShare>,
    cpus: usize,
    granted: &BTreeMap<String, Vec<String>>,
    inherited: &[(String, String)],
) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    // What shares the pool and asks for nothing is told nothing: how many threads are right there, its owner knows.
    let threads = share.and_then(|share| match share.cpus.len() {
        0 => share.most.or(share.asked).map(|threads| if cpus > 0 { threads.min(cpus) } else { threads }),
        _ => Some(cpus),
    });
    if let Some(threads) = threads.filter(|threads| *threads > 0) {
        variables.extend(THREADS.map(|name| (name.to_owned(), threads.to_string())));
    }
    let is_inherited = |name: &str| inherited.iter().any(|(known, _)| known == name);
    for (resource, names) in VISIBLE {
        let own = share.and_then(|share| share.devices.get(resource)).filter(|own| !own.is_empty());
        let is_granted = granted.get(resource).is_some_and(|all| !all.is_empty());
        if let Some(own) = own {
            let list = own.join(",");
            // HIP counts among those that ROCR leaves, and so does GPU_DEVICE_ORDINAL: to both the first level says it.
            let (first, others) =
                names.split_first().map_or((None, names), |(first, others)| (Some(first), others));
            variables.extend(first.map(|(name, _)| ((*name).to_owned(), list.clone())));
            for (name, _) in others {
                let list = match resource {
                    AMD => (0..own.len()).map(|n| n.to_string()).collect::<Vec<_>>().join(","),
                    _ => list.clone(),
                };
                variables.push(((*name).to_owned(), list));
            }
            if resource == NVIDIA && !is_inherited("CUDA_DEVICE_ORDER") {
                // As Slurm and nvidia-smi count; CUDA's own default is the fastest first.
                variables.push(("CUDA_DEVICE_ORDER".to_owned(), "PCI_BUS_ID".to_owned()));
            }
        } else {
            let said = names.iter().filter(|(name, _)| is_granted || is_inherited(name));
            variables.extend(said.map(|(name, none)| ((*name).to_owned(), (*none).to_owned())));
        }
    }
    variables
}
