//! Numbers: medians, and random numbers that are the same in every run.

/// The value that a share `quantile` of all values do not exceed. The values are reordered.
///
/// # Panics
///
/// If there are no values.
pub fn quantile(values: &mut [f64], quantile: f64) -> f64 {
    assert!(!values.is_empty(), "a quantile of nothing");
    let rank = ((values.len() as f64 * quantile).ceil() as usize).clamp(1, values.len());
    *values.select_nth_unstable_by(rank - 1, f64::total_cmp).1
}

/// The middle value; of an even number, the lower of the two. The values are reordered.
pub fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

/// SplitMix64: small, fast, and good enough to choose pages by.
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// All numbers below `count` in random order.
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut numbers: Vec<_> = (0..count).collect();
        for at in (1..count).rev() {
            numbers.swap(at, self.below(at + 1));
        }
        numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_of_the_set() {
        let mut values = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(median(&mut values), 3.0);
        assert_eq!(quantile(&mut values, 0.0), 1.0);
        assert_eq!(quantile(&mut values, 0.8), 4.0);
        assert_eq!(quantile(&mut values, 1.0), 5.0);
        assert_eq!(median(&mut [7.0, 9.0]), 7.0);
    }

    #[test]
    fn random_numbers_repeat_and_stay_below_the_end() {
        let (mut one, mut other) = (Random::new(9), Random::new(9));
        for end in 1..200 {
            let number = one.below(end);
            assert!(number < end);
            assert_eq!(number, other.below(end));
        }
        assert_ne!(Random::new(1).next(), Random::new(2).next());
    }

    #[test]
    fn a_permutation_has_each_number_once() {
        let mut numbers = Random::new(3).permutation(1000);
        assert_ne!(numbers[..5], [0, 1, 2, 3, 4]);
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..1000));
    }
}
