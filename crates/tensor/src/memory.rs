//! How much memory is left.

/// Bytes that can still be used without swapping, within the limits of this process's control group; `None` where the
/// system doesn't say.
pub fn available() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let meminfo = read("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let system = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    // Version 2 of control groups: the group of this process, then version 1. Without a limit there is no number.
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let group =
        read("/proc/self/cgroup").and_then(|text| Some(text.lines().find_map(|l| l.strip_prefix("0::"))?.to_string()));
    let base = format!("/sys/fs/cgroup{}", group.unwrap_or_default());
    let limits = [
        (format!("{base}/memory.max"), format!("{base}/memory.current")),
        ("/sys/fs/cgroup/memory.max".into(), "/sys/fs/cgroup/memory.current".into()),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes".into(), "/sys/fs/cgroup/memory/memory.usage_in_bytes".into()),
    ];
    let left = limits.iter().filter_map(|(max, used)| Some(number(max)?.saturating_sub(number(used)?))).min();
    Some(left.map_or(system, |l| l.min(system)))
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn is_plausible() {
        let bytes = super::available().unwrap();
        assert!(bytes > 1 << 20 && bytes < 1 << 50, "{bytes}");
    }
}
