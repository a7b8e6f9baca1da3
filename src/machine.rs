//! What the machine has: memory, cores, disk. Linux says it in text files; on a system without them every answer is
//! "unknown" and nothing else changes.

use std::fs;
use std::path::Path;

/// Bytes as people read them; units are powers of 1024.
pub fn human(bytes: usize) -> String {
    let units = ["GiB", "MiB", "KiB"].into_iter().zip([30, 20, 10]);
    let fits = units.into_iter().find(|(_, shift)| bytes >> shift > 0);
    fits.map_or(format!("{bytes} B"), |(unit, shift)| format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64))
}

/// The number of bytes behind `key:` in /proc/meminfo or /proc/self/status.
fn field(text: &str, key: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: usize = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// The largest amount of memory that this process ever had in use (VmHWM), in bytes.
pub fn peak_resident() -> Option<usize> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// What this process has in use now (VmRSS), in bytes.
pub fn resident() -> Option<usize> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS")
}

/// Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    pub total: usize,
    /// What a program can have without others being swapped out (MemAvailable), within `limit`.
    pub available: usize,
    /// Of the control group (container), where it has one.
    pub limit: Option<usize>,
}

pub fn memory() -> Option<Memory> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let group = |name: &str| fs::read_to_string(control_group()?.join(name)).ok()?.trim().parse().ok();
    Memory::of(&meminfo, group("memory.max"), group("memory.current"))
}

impl Memory {
    fn of(meminfo: &str, limit: Option<usize>, used: Option<usize>) -> Option<Self> {
        let (total, available) = (field(meminfo, "MemTotal")?, field(meminfo, "MemAvailable")?);
        let within = limit.map_or(usize::MAX, |limit| limit.saturating_sub(used.unwrap_or(0)));
        Some(Self { total, available: available.min(within), limit })
    }
}

/// The folder of this process's control group (version 2).
fn control_group() -> Option<std::path::PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

#[derive(Clone, PartialEq, Debug)]
pub struct Processor {
    pub name: Option<String>,
    pub logical: usize,
    pub physical: usize,
    /// Logical cores that this process may use.
    pub allowed: usize,
    /// Cores' worth of time that its control group gets.
    pub quota: Option<f64>,
}

pub fn processor() -> Processor {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let max = control_group().and_then(|group| fs::read_to_string(group.join("cpu.max")).ok());
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    Processor::of(&cpuinfo, allowed, max.as_deref())
}

impl Processor {
    fn of(cpuinfo: &str, allowed: usize, max: Option<&str>) -> Self {
        let value = |line: &str| Some(line.split_once(':')?.1.trim().to_string());
        let all = |key: &str| -> Vec<String> {
            cpuinfo.lines().filter(|line| line.starts_with(key)).filter_map(value).collect()
        };
        let logical = all("processor").len().max(1);
        let mut cores: Vec<_> = all("physical id").into_iter().zip(all("core id")).collect();
        cores.sort();
        cores.dedup();
        // A virtual machine may hide its cores; then each counts for itself.
        let physical = if cores.is_empty() { logical } else { cores.len() };
        let quota = max.and_then(|max| {
            let (quota, period) = max.trim().split_once(' ')?;
            Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
        });
        Self { name: all("model name").into_iter().next(), logical, physical, allowed, quota }
    }
}

/// The path itself, or the folder above it that is there.
pub fn existing(path: &Path) -> &Path {
    let found = path.ancestors().find(|p| p.exists());
    found.unwrap_or(if path.is_absolute() { Path::new("/") } else { Path::new(".") })
}

/// Bytes that can still be written where `path` is or would be.
pub fn disk_free(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(existing(path).as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` ends in 0, and the struct is written before it is read.
    let found = unsafe { (libc::statvfs(name.as_ptr(), found.as_mut_ptr()) == 0).then(|| found.assume_init()) }?;
    Some(found.f_bavail * found.f_frsize)
}

/// Gives memory back to the system that was allocated and freed: reading text leaves many small holes.
pub fn release_freed() {
    // SAFETY: it may be called at any time.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n";

    #[test]
    fn sizes_read_well() {
        let read = [0, 1023, 1024, 1536, 5 << 20, (3 << 30) + (1 << 29)].map(human);
        assert_eq!(read, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.5 GiB"]);
    }

    #[test]
    fn a_container_has_what_its_limit_leaves() {
        let of = |limit, used| Memory::of(MEMINFO, limit, used).unwrap();
        assert_eq!(of(None, None), Memory { total: 1000 << 10, available: 600 << 10, limit: None });
        assert_eq!(of(Some(500 << 10), Some(100 << 10)).available, 400 << 10);
        assert_eq!(of(Some(100), Some(200)).available, 0);
        assert_eq!(of(Some(usize::MAX), None).available, 600 << 10);
        assert_eq!(Memory::of("MemTotal: 5 kB", None, None), None);
        assert_eq!((field("VmHWM:\t 12 kB", "VmHWM"), field("VmHWM: x kB", "VmHWM")), (Some(12 << 10), None));
    }

    #[test]
    fn threads_of_a_core_count_once() {
        let cpu = |id: usize, core: usize| {
            format!("processor\t: {id}\nmodel name\t: A chip\nphysical id\t: 0\ncore id\t\t: {core}\n\n")
        };
        let info: String = [cpu(0, 0), cpu(1, 0), cpu(2, 1), cpu(3, 1)].concat();
        let found = Processor::of(&info, 3, Some("150000 100000\n"));
        let name = Some("A chip".to_string());
        assert_eq!(found, Processor { name, logical: 4, physical: 2, allowed: 3, quota: Some(1.5) });
        let hidden = Processor::of("processor: 0\nprocessor: 1\n", 2, Some("max 100000"));
        assert_eq!(hidden, Processor { name: None, logical: 2, physical: 2, allowed: 2, quota: None });
    }

    #[test]
    fn this_machine_answers() {
        assert!(peak_resident() >= resident() && resident() > Some(1 << 18));
        let memory = memory().unwrap();
        assert!(memory.available <= memory.total);
        assert!(disk_free(Path::new("no/such/folder")).is_some());
        release_freed();
    }
}
