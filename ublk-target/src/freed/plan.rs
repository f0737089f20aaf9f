//! What has to be known of this kernel to hear of freed swap slots: where it frees them, and where it keeps what.
//!
//! Nothing is guessed: names, sizes and places are those that the kernel gives itself, and where one of them is not as expected
//! there is no plan. It holds until the next boot.
//!
//! There is one function in which the kernel frees slots, `swap_range_free`, and it is built into its callers. It in turn calls
//! another, which forgets what the swap cache still knew of them, and that is where we listen:
//! `clear_shadow_from_swap_cache(type, begin, end)`, where `end` is the last slot, not the one behind it. For all of it to be exact,
//! slots may not be given away again before that call returns, and it may be called for none that is still in use:
//!
//! - Its only caller is `swap_range_free`, at whose end it is called for all the slots. To Linux 6.13 that is called with
//!   `si->lock` held, which whoever allocates slots holds as well: by `swap_entry_free` and `swap_free_cluster`, later
//!   `swap_entry_range_free`, each of which has set the slots' counts in `si->swap_map` to 0 before. (Read in 6.1 and 6.12.)
//! - To Linux 6.17, the same without `si->lock`: the lock of the cluster, which the slots all are in, is held instead from
//!   before their counts are 0 until after the call, and whoever allocates slots holds it. (Read in the changes that made it so.)
//!
//! Later ones have another function, and no plan. The program asks for a count of 0 for each slot that it marks, so that it would
//! not mark one in use even if somebody else called the function.

use std::ffi::CStr;
use std::fs;

use serde::{Deserialize, Serialize};

use super::btf::{Btf, Member, Sort};
use super::{FreedError, bpf, program};

/// Where the kernel describes its types.
const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's list of swap areas.
const AREAS: &str = "swap_info";

/// The function to listen at,
pub(super) const FUNCTION: &CStr = c"clear_shadow_from_swap_cache";

/// and what it is called with: the number of a swap area, its first freed slot, and its last.
const PARAMETERS: [(&str, u32, Sort); 3] =
    [("type", 4, Sort::Integer), ("begin", 8, Sort::Integer), ("end", 8, Sort::Integer)];

/// Where a swap area has what, `struct swap_info_struct`, and its block device, in bytes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Fields {
    pub(super) flags: u32,
    /// Its number, one byte.
    pub(super) number: u32,
    /// A byte for each slot that says how often it is in use.
    pub(super) uses: u32,
    pub(super) device: u32,
    /// In the device: major and minor number, four bytes.
    pub(super) device_number: u32,
}

impl Fields {
    fn of(btf: &Btf<'_>) -> Option<Self> {
        let area = |name, bytes, sort| offset(btf.member("swap_info_struct", name), bytes, sort);
        Some(Self {
            flags: area("flags", 8, Sort::Integer)?,
            number: area("type", 1, Sort::Integer)?,
            uses: area("swap_map", 8, Sort::Pointer)?,
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
    /// Where the list of swap areas is: pointers, by the areas' numbers.
    pub(super) areas: u64,
    pub(super) fields: Fields,
    /// The flag of areas that are a whole block device, or a whole partition.
    pub(super) block_device_flag: u32,
}

impl Plan {
    /// Asks this kernel. It needs CAP_BPF, CAP_PERFMON and CAP_SYSLOG, or CAP_SYS_ADMIN and CAP_SYSLOG, and Linux 5.16.
    pub fn make() -> Result<Self, FreedError> {
        if program::ARGUMENTS.is_none() {
            return Err(FreedError::Unsupported { what: "this processor" });
        }
        if rustix::param::page_size() != 4096 {
            return Err(FreedError::Unsupported { what: "a kernel with other pages" });
        }
        let types = fs::read(TYPES).map_err(|source| FreedError::NoTypes { source })?;
        let btf = Btf::parse(&types).map_err(|source| FreedError::Types { source })?;
        let shape = Self::shape(&btf)?;
        Ok(Self { areas: bpf::symbol(AREAS)?, ..shape })
    }

    /// Whether a kernel could be listened to that describes its types so. Nothing is tried.
    pub fn check(types: &[u8]) -> Result<(), FreedError> {
        let btf = Btf::parse(types).map_err(|source| FreedError::Types { source })?;
        Self::shape(&btf).map(drop)
    }

    /// All but the address.
    fn shape(btf: &Btf<'_>) -> Result<Self, FreedError> {
        let no = |what| FreedError::NoHook { what };
        let parameters = btf.function(&FUNCTION.to_string_lossy()).unwrap_or_default();
        let parameters = parameters.iter().map(|each| (each.name, each.bytes, each.sort));
        if !parameters.eq(PARAMETERS) {
            return Err(no("the function that it knows is not there, or is another"));
        }
        let fields = Fields::of(btf).ok_or(no("swap areas are kept in another way"))?;
        let flag = btf.enumerator("SWP_BLKDEV").filter(|flag| flag.is_power_of_two());
        let flag = flag.and_then(|flag| i32::try_from(flag).ok());
        let flag = flag.ok_or(no("swap areas have other flags"))?;
        Ok(Self { areas: 0, fields, block_device_flag: flag as u32 })
    }
}

#[cfg(test)]
mod tests {
    use super::super::btf::tests::Writer;
    use super::*;

    /// What a kernel says, with a change.
    fn kernel(function: &CStr, third: &str, count_bytes: u32, map: &str) -> Vec<u8> {
        let mut writer = Writer::new();
        let int = writer.int("int", 4);
        let long = writer.int("unsigned long", 8);
        let byte = writer.int("signed char", 1);
        let pointer = writer.pointer();
        let count = writer.int("count", count_bytes);
        writer.structure(
            "swap_info_struct",
            200,
            &[
                ("flags", long, 64),
                ("type", byte, 160),
                (map, pointer, 320),
                ("bdev", pointer, 512),
            ],
        );
        writer.structure("block_device", 100, &[("bd_dev", int, 256)]);
        writer.enumeration(&[("SWP_USED", 1), ("SWP_BLKDEV", 64)]);
        writer.function(
            function.to_str().unwrap(),
            &[("type", count), ("begin", long), (third, long)],
        );
        writer.finish()
    }

    fn plan(bytes: &[u8]) -> Result<Plan, FreedError> {
        Plan::shape(&Btf::parse(bytes).unwrap())
    }

    #[test]
    fn a_kernel_that_is_as_expected_has_a_plan() {
        let fields = Fields { flags: 8, number: 20, uses: 40, device: 64, device_number: 32 };
        let types = kernel(FUNCTION, "end", 4, "swap_map");
        assert_eq!(plan(&types).unwrap(), Plan { areas: 0, fields, block_device_flag: 64 });
        assert!(Plan::check(&types).is_ok());
        assert!(matches!(Plan::check(&types[1..]), Err(FreedError::Types { .. })));
    }

    #[test]
    fn what_is_not_quite_so_has_none() {
        for (function, third, count_bytes, map) in [
            (FUNCTION, "count", 4, "swap_map"),
            (FUNCTION, "end", 8, "swap_map"),
            (FUNCTION, "end", 4, "table"),
            (c"__swap_cache_clear_shadow", "end", 4, "swap_map"),
        ] {
            let plan = plan(&kernel(function, third, count_bytes, map));
            let refused = matches!(plan, Err(FreedError::NoHook { .. }));
            assert!(refused, "{function:?} {third} {count_bytes} {map}: {plan:?}");
        }
    }

    #[test]
    fn a_plan_is_the_same_after_it_was_handed_over() {
        let old = kernel(FUNCTION, "end", 4, "swap_map");
        let plan = Plan { areas: 0xffff_ffff_8200_0000, ..plan(&old).unwrap() };
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    }
}
