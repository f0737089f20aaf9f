//! What has to be known of this kernel to hear of freed swap slots: where it frees them, and where it keeps what.
//!
//! Nothing is guessed: names, sizes and places are those that the kernel gives itself, and where one of them is not as expected
//! there is no plan. It holds until the next boot.
//!
//! There is one function in which the kernel frees slots, `swap_range_free`, and it is built into its callers. So we listen at another
//! that is called whenever that is. For all of it to be exact, slots may not be given away again before the call returns,
//! and it may be called for none that is still in use:
//!
//! - Linux 5.9 to 6.17: `clear_shadow_from_swap_cache(type, begin, end)`, where `end` is the last slot, not the one behind it. Its only
//!   caller is `swap_range_free`, at whose end it is called for all the slots. To Linux 6.13 that is called with
//!   `si->lock` held, which whoever allocates slots holds as well: by `swap_entry_free` and `swap_free_cluster`, later
//!   `swap_entry_range_free`, each of which has set the slots' counts in `si->swap_map` to 0 before. (Read in 6.1 and 6.12.)
//!   Then the same without `si->lock`: the lock of the cluster, which the slots all are in, is held instead from
//!   before their counts are 0 until after the call, and whoever allocates slots holds it. (Read in the changes that made it so.)
//!   The program asks for a count of 0 for each slot that it marks, so that it would not mark one in use even if somebody else called
//!   the function.
//! - Where there is a swap table and no `si->swap_map` any more: `__swap_cluster_free_entries(si, ci, ci_start, nr_pages)`, the only
//!   caller of `swap_range_free`. All of its own callers hold the lock of the cluster, and have seen that nobody uses the slots, or
//!   that the last use is just given up; whoever allocates slots holds that lock. (Read in 7.3.)
//!
//! Those in between have another function, and no plan.

use std::ffi::CStr;
use std::fs;

use serde::{Deserialize, Serialize};

use super::btf::{Btf, Member, Sort};
use super::{FreedError, bpf, program};

/// Where the kernel describes its types.
const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's list of swap areas.
const AREAS: &str = "swap_info";

/// What a function is called with: names, sizes and sorts.
type Parameters = &'static [(&'static str, u32, Sort)];

/// Where to listen, and what has to be known there. Places are in `struct swap_info_struct`, in bytes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) enum Hook {
    /// It is told the number of a swap area, its first freed slot, and its last.
    Range {
        /// The address of the list of swap areas: pointers, by the areas' numbers.
        areas: u64,
        /// Where an area has its number, one byte.
        number: u32,
        /// Where it has the address of a byte for each slot, that says how often it is in use.
        uses: u32,
    },
    /// It is told a swap area and one of its clusters, the first freed slot in that, and how many.
    Cluster {
        /// Where an area has the address of its clusters.
        clusters: u32,
        /// How large each of these is.
        cluster_bytes: u32,
        /// Slots of a cluster, as a power of two.
        slots_log: u32,
    },
}

impl Hook {
    /// The function.
    pub(super) fn function(self) -> &'static CStr {
        match self {
            Self::Range { .. } => RANGE.0,
            Self::Cluster { .. } => CLUSTER.0,
        }
    }

    /// The one that this kernel has; of a list of areas, without its address.
    fn of(btf: &Btf<'_>) -> Option<Self> {
        let area = |name, bytes, sort| offset(btf.member("swap_info_struct", name), bytes, sort);
        if has(btf, RANGE) {
            let number = area("type", 1, Sort::Integer)?;
            return Some(Self::Range {
                areas: 0,
                number,
                uses: area("swap_map", 8, Sort::Pointer)?,
            });
        }
        if !has(btf, CLUSTER) || btf.member("swap_info_struct", "swap_map").is_some() {
            return None;
        }
        let cluster_bytes = btf.structure_bytes("swap_cluster_info")?;
        let slots = btf.structure_bytes("swap_table")? / 8;
        let is_sane = (1..1 << 12).contains(&cluster_bytes)
            && slots.is_power_of_two()
            && slots <= program::SLOTS_MAX;
        let clusters = area("cluster_info", 8, Sort::Pointer)?;
        is_sane.then_some(Self::Cluster { clusters, cluster_bytes, slots_log: slots.ilog2() })
    }
}

const RANGE: (&CStr, Parameters) = (
    c"clear_shadow_from_swap_cache",
    &[("type", 4, Sort::Integer), ("begin", 8, Sort::Integer), ("end", 8, Sort::Integer)],
);

const CLUSTER: (&CStr, Parameters) = (
    c"__swap_cluster_free_entries",
    &[
        ("si", 8, Sort::Pointer),
        ("ci", 8, Sort::Pointer),
        ("ci_start", 4, Sort::Integer),
        ("nr_pages", 4, Sort::Integer),
    ],
);

/// Whether there is such a function.
fn has(btf: &Btf<'_>, (function, parameters): (&CStr, Parameters)) -> bool {
    let seen = btf.function(&function.to_string_lossy()).unwrap_or_default();
    let seen = seen.iter().map(|each| (each.name, each.bytes, each.sort));
    seen.eq(parameters.iter().copied())
}

/// Where a swap area has what, and its block device, in bytes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Fields {
    pub(super) flags: u32,
    pub(super) device: u32,
    /// In the device: major and minor number, four bytes.
    pub(super) device_number: u32,
}

impl Fields {
    fn of(btf: &Btf<'_>) -> Option<Self> {
        let area = |name, bytes, sort| offset(btf.member("swap_info_struct", name), bytes, sort);
        Some(Self {
            flags: area("flags", 8, Sort::Integer)?,
            device: area("bdev", 8, Sort::Pointer)?,
            device_number: offset(btf.member("block_device", "bd_dev"), 4, Sort::Integer)?,
        })
    }
}

/// Where a member is that is as expected, and no further away than any should be.
fn offset(member: Option<Member>, bytes: u32, sort: Sort) -> Option<u32> {
    const OFFSET_MAX: u32 = 1 << 16;
    let member = member.filter(|member| (member.bytes, member.sort) == (bytes, sort))?;
    (member.offset < OFFSET_MAX).then_some(member.offset)
}

/// See the module's description.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Plan {
    pub(super) hook: Hook,
    pub(super) fields: Fields,
    /// The flag of areas that are a whole block device, or a whole partition.
    pub(super) block_device_flag: u32,
}

impl Plan {
    /// Asks this kernel. Of one with a list of areas it needs CAP_SYSLOG, and CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, and Linux 5.16.
    pub fn make() -> Result<Self, FreedError> {
        if program::ARGUMENTS.is_none() {
            return Err(FreedError::Unsupported { what: "this processor" });
        }
        if rustix::param::page_size() != 4096 {
            return Err(FreedError::Unsupported { what: "a kernel with other pages" });
        }
        let types = fs::read(TYPES).map_err(|source| FreedError::NoTypes { source })?;
        let btf = Btf::parse(&types).map_err(|source| FreedError::Types { source })?;
        let mut plan = Self::shape(&btf)?;
        if let Hook::Range { areas, .. } = &mut plan.hook {
            *areas = bpf::symbol(AREAS)?;
        }
        Ok(plan)
    }

    /// Whether CAP_SYSLOG is needed to listen to a kernel that describes its types so; an error if that cannot be. Nothing is tried.
    pub fn needs_syslog(types: &[u8]) -> Result<bool, FreedError> {
        let btf = Btf::parse(types).map_err(|source| FreedError::Types { source })?;
        Ok(matches!(Self::shape(&btf)?.hook, Hook::Range { .. }))
    }

    /// All but the address.
    fn shape(btf: &Btf<'_>) -> Result<Self, FreedError> {
        let no = |what| FreedError::NoHook { what };
        let hook =
            Hook::of(btf).ok_or(no("the functions that it knows are not there, or are others"))?;
        let fields = Fields::of(btf).ok_or(no("swap areas are kept in another way"))?;
        let flag = btf.enumerator("SWP_BLKDEV").filter(|flag| flag.is_power_of_two());
        let flag = flag.and_then(|flag| i32::try_from(flag).ok());
        let flag = flag.ok_or(no("swap areas have other flags"))?;
        Ok(Self { hook, fields, block_device_flag: flag as u32 })
    }
}

#[cfg(test)]
mod tests {
    use super::super::btf::tests::Writer;
    use super::*;

    /// What a kernel says, of such a function and with such a member.
    fn kernel(function: &CStr, parameters: &[(&str, &str)], member: &str) -> Vec<u8> {
        let mut writer = Writer::new();
        let int = writer.int("int", 4);
        let long = writer.int("unsigned long", 8);
        let byte = writer.int("signed char", 1);
        let pointer = writer.pointer();
        writer.structure(
            "swap_info_struct",
            200,
            &[
                ("flags", long, 64),
                ("type", byte, 160),
                ("cluster_info", pointer, 192),
                (member, pointer, 320),
                ("bdev", pointer, 512),
            ],
        );
        writer.structure("swap_cluster_info", 48, &[("count", int, 0)]);
        writer.structure("swap_table", 4096, &[("entries", long, 0)]);
        writer.structure("block_device", 100, &[("bd_dev", int, 256)]);
        writer.enumeration(&[("SWP_USED", 1), ("SWP_BLKDEV", 64)]);
        let kind = |kind| match kind {
            "int" => int,
            "long" => long,
            _ => pointer,
        };
        let parameters: Vec<_> = parameters.iter().map(|&(name, of)| (name, kind(of))).collect();
        writer.function(function.to_str().unwrap(), &parameters);
        writer.finish()
    }

    const OF_RANGE: [(&str, &str); 3] = [("type", "int"), ("begin", "long"), ("end", "long")];
    const OF_CLUSTER: [(&str, &str); 4] =
        [("si", "pointer"), ("ci", "pointer"), ("ci_start", "int"), ("nr_pages", "int")];

    fn plan(bytes: &[u8]) -> Result<Plan, FreedError> {
        Plan::shape(&Btf::parse(bytes).unwrap())
    }

    #[test]
    fn kernels_of_both_kinds_have_a_plan() {
        let fields = Fields { flags: 8, device: 64, device_number: 32 };
        let expected = |hook| Plan { hook, fields, block_device_flag: 64 };
        let range = kernel(RANGE.0, &OF_RANGE, "swap_map");
        let hook = Hook::Range { areas: 0, number: 20, uses: 40 };
        assert_eq!(plan(&range).unwrap(), expected(hook));
        let cluster = kernel(CLUSTER.0, &OF_CLUSTER, "other");
        let hook = Hook::Cluster { clusters: 24, cluster_bytes: 48, slots_log: 9 };
        assert_eq!(plan(&cluster).unwrap(), expected(hook));
        assert!(Plan::needs_syslog(&range).unwrap() && !Plan::needs_syslog(&cluster).unwrap());
        assert!(matches!(Plan::needs_syslog(&cluster[1..]), Err(FreedError::Types { .. })));
    }

    #[test]
    fn what_is_not_quite_so_has_none() {
        let with = |parameters: &[(&'static str, &'static str)], at: usize, other| {
            let mut parameters = parameters.to_vec();
            parameters[at] = other;
            parameters
        };
        for (function, parameters, member) in [
            (RANGE.0, with(&OF_RANGE, 2, ("count", "long")), "swap_map"),
            (RANGE.0, with(&OF_RANGE, 0, ("type", "long")), "swap_map"),
            (RANGE.0, OF_RANGE.to_vec(), "table"),
            (RANGE.0, OF_RANGE[..2].to_vec(), "swap_map"),
            (CLUSTER.0, OF_CLUSTER.to_vec(), "swap_map"),
            (CLUSTER.0, with(&OF_CLUSTER, 1, ("offset", "long")), "table"),
            (c"__swap_cache_clear_shadow", OF_RANGE.to_vec(), "swap_map"),
        ] {
            let plan = plan(&kernel(function, &parameters, member));
            let refused = matches!(plan, Err(FreedError::NoHook { .. }));
            assert!(refused, "{function:?} {parameters:?} {member}: {plan:?}");
        }
    }

    #[test]
    fn a_plan_is_the_same_after_it_was_handed_over() {
        for types in
            [kernel(RANGE.0, &OF_RANGE, "swap_map"), kernel(CLUSTER.0, &OF_CLUSTER, "other")]
        {
            let plan = plan(&types).unwrap();
            let text = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
        }
    }
}
