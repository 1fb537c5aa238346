//! Which GPUs they are, as the vendor's own tool says where there is one: `nvidia-smi`, `rocm-smi`.

use std::time::Duration;

use super::command::Program;
use super::{Environment, Gpu, Vendor};

/// How long a tool may take: nvidia-smi wakes each GPU first, which takes seconds where no daemon keeps them awake.
const LIMIT: Duration = Duration::from_secs(4);

/// What one vendor's GPUs are. Nothing is said of a host with several kinds: the tools count all GPUs, a job its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuModel {
    /// The vendor.
    pub vendor: Vendor,
    /// The product's name, as the tool writes it.
    pub product: String,
    /// Memory of one GPU in MiB, where the tool says it.
    pub memory_mib: Option<u64>,
}

/// Asks the tools of the vendors of whom there are GPUs. What cannot be learnt is left out.
pub async fn gpu_models(env: &Environment, gpus: &[Gpu]) -> Vec<GpuModel> {
    let ids =
        |vendor| gpus.iter().filter(|gpu| gpu.vendor == vendor).map(|gpu| gpu.id.clone()).collect::<Vec<_>>();
    let (nvidia, amd) = tokio::join!(ask_nvidia(env, ids(Vendor::Nvidia)), ask_amd(env, ids(Vendor::Amd)));
    nvidia.into_iter().chain(amd).collect()
}

async fn ask_nvidia(env: &Environment, ids: Vec<String>) -> Option<GpuModel> {
    let first = ids.first()?;
    // Its numbers may be the host's, while ours count what the job sees; UUIDs are the same everywhere.
    let one = format!("--id={first}");
    let which = first.starts_with("GPU-").then_some(one.as_str());
    let query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"];
    let answer =
        Program::find("nvidia-smi", env).args(which.into_iter().chain(query)).run(LIMIT).await.ok()?;
    parse_nvidia(&answer.success().ok()?.stdout)
}

/// Reads `NVIDIA A100-SXM4-40GB, 40960`, of which there is a line a GPU.
fn parse_nvidia(text: &str) -> Option<GpuModel> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next()?;
    if lines.any(|line| line != first) {
        return None;
    }
    let (product, memory) = first.rsplit_once(',')?;
    let product = product.trim().to_owned();
    let memory_mib = memory.trim().parse().ok();
    (!product.is_empty()).then_some(GpuModel { vendor: Vendor::Nvidia, product, memory_mib })
}

async fn ask_amd(env: &Environment, ids: Vec<String>) -> Option<GpuModel> {
    ids.first()?;
    let arguments = ["--showproductname", "--showmeminfo", "vram", "--csv"];
    let answer = Program::find("rocm-smi", env).args(arguments).run(LIMIT).await.ok()?;
    parse_amd(&answer.success().ok()?.stdout)
}

/// Reads rocm-smi's table: a line of names, then a line a GPU. Columns and their order differ between its versions.
fn parse_amd(text: &str) -> Option<GpuModel> {
    let mut lines = text.lines().skip_while(|line| !line.starts_with("device"));
    let names: Vec<&str> = lines.next()?.split(',').map(str::trim).collect();
    let values: Vec<&str> = lines.next()?.split(',').map(str::trim).collect();
    let value = |wanted: &str| {
        let at = names.iter().position(|name| name.eq_ignore_ascii_case(wanted))?;
        values.get(at).copied().filter(|value| !value.is_empty())
    };
    let product = value("Card Series").or_else(|| value("Card model"))?.to_owned();
    let memory_mib =
        value("VRAM Total Memory (B)").and_then(|bytes| bytes.parse::<u64>().ok()).map(|b| b >> 20);
    Some(GpuModel { vendor: Vendor::Amd, product, memory_mib })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tools_tables_are_read() {
        let model =
            |vendor, product: &str, memory_mib| GpuModel { vendor, product: product.to_owned(), memory_mib };
        let nvidia = "NVIDIA A100-SXM4-40GB, 40960\nNVIDIA A100-SXM4-40GB, 40960\n";
        assert_eq!(parse_nvidia(nvidia), Some(model(Vendor::Nvidia, "NVIDIA A100-SXM4-40GB", Some(40_960))));
        assert_eq!(parse_nvidia("Tesla, V100, [N/A]\n"), Some(model(Vendor::Nvidia, "Tesla, V100", None)));
        assert_eq!(parse_nvidia("No devices were found\n"), None);
        assert_eq!(parse_nvidia("NVIDIA A100, 40960\nNVIDIA T4, 15360\n"), None, "which of them is ours?");
        let amd = "\ndevice,VRAM Total Memory (B),VRAM Total Used Memory (B),Card Series,Card Model\n\
                   card0,68702699520,10960896,AMD Instinct MI250X,0x740c\n";
        assert_eq!(parse_amd(amd), Some(model(Vendor::Amd, "AMD Instinct MI250X", Some(65_520))));
        assert_eq!(parse_amd("WARNING: no GPUs\n"), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "(device)?(?s).{0,80}") {
            let _ = parse_nvidia(&text);
            let _ = parse_amd(&text);
        }
    }
}
