//! Arithmetic on sizes: `min(ram / 2, 8G)`.
//!
//! ```text
//! sum     = product { ("+" | "-") product }
//! product = value { ("*" | "/") value }
//! value   = number [unit | "%"] | "ram" | ("min" | "max") "(" sum { "," sum } ")" | "(" sum ")"
//! ```
//!
//! A value is an exact fraction; what 128 bits do not hold is an error and never wrong. A text is as long and as
//! nested as the bounds here allow, so that neither reading nor computing one takes long.

use super::{Decimal, unit_shift};

/// The longest text, in bytes.
const LENGTH_MAX: usize = 256;

/// How deep parentheses may be in one another.
const DEPTH_MAX: u32 = 16;

/// The largest share of RAM that can be asked for, in percent.
const PERCENT_MAX: i128 = 100 * 100;

/// Why a text is no expression, or has no value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wrong {
    /// It is none.
    Malformed,
    /// It is longer or deeper than anybody writes by hand.
    Complex,
    /// A value on the way is too large, or too fine.
    TooLarge,
    /// Something is divided by nothing.
    DividedByZero,
    /// The value is below zero.
    Negative,
}

/// An expression that has been read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Expression {
    /// A number of bytes.
    Number(Fraction),
    /// A number with a decimal point and no unit: what something else can be multiplied by.
    Factor(Fraction),
    /// So many hundredths of RAM.
    Percent(Fraction),
    /// All of RAM.
    Ram,
    /// Two expressions and what to do with them.
    Both(Operator, Box<Expression>, Box<Expression>),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    Min,
    Max,
}

impl Expression {
    /// Reads all of `text`.
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        if text.len() > LENGTH_MAX {
            return Err(Wrong::Complex);
        }
        let mut parser = Parser { rest: text, depth: 0 };
        let expression = parser.sum()?;
        parser.skip_space();
        if parser.rest.is_empty() { Ok(expression) } else { Err(Wrong::Malformed) }
    }

    /// Its value on a machine with `ram` bytes of memory.
    pub(super) fn value(&self, ram: u64) -> Result<Fraction, Wrong> {
        let ram_fraction = || Fraction::whole(i128::from(ram));
        match self {
            Self::Number(number) | Self::Factor(number) => Ok(*number),
            Self::Percent(percent) => percent.times(ram_fraction())?.over(Fraction::whole(100)),
            Self::Ram => Ok(ram_fraction()),
            Self::Both(operator, left, right) => {
                operator.apply(left.value(ram)?, right.value(ram)?)
            }
        }
    }

    /// Whether the value depends on how much memory there is.
    pub(super) fn mentions_ram(&self) -> bool {
        match self {
            Self::Number(_) | Self::Factor(_) => false,
            Self::Percent(_) | Self::Ram => true,
            Self::Both(_, left, right) => left.mentions_ram() || right.mentions_ram(),
        }
    }

    /// Whether what is written names a number of bytes to the byte: nothing is a share, a part or a fraction.
    pub(super) fn is_exact(&self) -> bool {
        match self {
            Self::Number(number) => number.exact,
            Self::Factor(_) | Self::Percent(_) | Self::Ram | Self::Both(Operator::Divide, ..) => {
                false
            }
            Self::Both(_, left, right) => left.is_exact() && right.is_exact(),
        }
    }
}

impl Operator {
    fn apply(self, left: Fraction, right: Fraction) -> Result<Fraction, Wrong> {
        match self {
            Self::Add => left.plus(right),
            Self::Subtract => left.plus(right.negative()),
            Self::Multiply => left.times(right),
            Self::Divide => left.over(right),
            Self::Min => Ok(if left.is_below(right)? { left } else { right }),
            Self::Max => Ok(if left.is_below(right)? { right } else { left }),
        }
    }
}

/// An exact fraction. The divisor is above zero, and nothing divides both.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Fraction {
    dividend: i128,
    divisor: i128,
    /// Whether it was written without a decimal point.
    exact: bool,
}

impl Fraction {
    /// A whole number; not the smallest of all, which has no negative.
    fn whole(number: i128) -> Self {
        Self { dividend: number, divisor: 1, exact: true }
    }

    fn new(dividend: i128, divisor: i128) -> Result<Self, Wrong> {
        if divisor == 0 {
            return Err(Wrong::DividedByZero);
        }
        let common = common_divisor(dividend.unsigned_abs(), divisor.unsigned_abs());
        let common = i128::try_from(common).map_err(|_| Wrong::TooLarge)?;
        let sign = divisor.signum();
        let dividend = (dividend / common).checked_mul(sign).ok_or(Wrong::TooLarge)?;
        let divisor = (divisor / common).checked_mul(sign).ok_or(Wrong::TooLarge)?;
        // Then every value has a negative.
        if dividend == i128::MIN {
            return Err(Wrong::TooLarge);
        }
        Ok(Self { dividend, divisor, exact: false })
    }

    fn negative(self) -> Self {
        Self { dividend: -self.dividend, ..self }
    }

    fn plus(self, other: Self) -> Result<Self, Wrong> {
        let left = multiply(self.dividend, other.divisor)?;
        let right = multiply(other.dividend, self.divisor)?;
        let sum = left.checked_add(right).ok_or(Wrong::TooLarge)?;
        Self::new(sum, multiply(self.divisor, other.divisor)?)
    }

    fn times(self, other: Self) -> Result<Self, Wrong> {
        // Reduced crosswise first: the products are as small as they can be.
        let left = Self::new(self.dividend, other.divisor)?;
        let right = Self::new(other.dividend, self.divisor)?;
        let dividend = multiply(left.dividend, right.dividend)?;
        Self::new(dividend, multiply(left.divisor, right.divisor)?)
    }

    fn over(self, other: Self) -> Result<Self, Wrong> {
        self.times(Self::new(other.divisor, other.dividend)?)
    }

    fn is_below(self, other: Self) -> Result<bool, Wrong> {
        Ok(multiply(self.dividend, other.divisor)? < multiply(other.dividend, self.divisor)?)
    }

    /// Rounded down.
    pub(super) fn bytes(self) -> Result<u64, Wrong> {
        if self.dividend < 0 {
            return Err(Wrong::Negative);
        }
        u64::try_from(self.dividend / self.divisor).map_err(|_| Wrong::TooLarge)
    }
}

fn multiply(left: i128, right: i128) -> Result<i128, Wrong> {
    left.checked_mul(right).ok_or(Wrong::TooLarge)
}

/// The greatest number that divides both, which are not both zero.
fn common_divisor(mut left: u128, mut right: u128) -> u128 {
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}

struct Parser<'a> {
    rest: &'a str,
    depth: u32,
}

impl<'a> Parser<'a> {
    fn sum(&mut self) -> Result<Expression, Wrong> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(Wrong::Complex);
        }
        let mut left = self.product()?;
        loop {
            let operator = match self.next_of("+-") {
                Some('+') => Operator::Add,
                Some(_) => Operator::Subtract,
                None => break,
            };
            left = both(operator, left, self.product()?);
        }
        self.depth -= 1;
        Ok(left)
    }

    fn product(&mut self) -> Result<Expression, Wrong> {
        let mut left = self.value()?;
        loop {
            let operator = match self.next_of("*/") {
                Some('*') => Operator::Multiply,
                Some(_) => Operator::Divide,
                None => return Ok(left),
            };
            left = both(operator, left, self.value()?);
        }
    }

    fn value(&mut self) -> Result<Expression, Wrong> {
        if self.next_of("(").is_some() {
            let inner = self.sum()?;
            return self.expect(")").map(|()| inner);
        }
        match self.word() {
            "" => self.number(),
            "ram" => Ok(Expression::Ram),
            "min" => self.least_or_most(Operator::Min),
            "max" => self.least_or_most(Operator::Max),
            _ => Err(Wrong::Malformed),
        }
    }

    fn least_or_most(&mut self, operator: Operator) -> Result<Expression, Wrong> {
        self.expect("(")?;
        let mut result = self.sum()?;
        while self.next_of(",").is_some() {
            result = both(operator, result, self.sum()?);
        }
        self.expect(")").map(|()| result)
    }

    fn number(&mut self) -> Result<Expression, Wrong> {
        let digits = self.take(|c| c.is_ascii_digit() || c == '.');
        let number = Decimal::parse(digits).ok_or(Wrong::Malformed)?;
        let dividend = i128::try_from(number.digits).map_err(|_| Wrong::TooLarge)?;
        let divisor = i128::try_from(number.divisor).map_err(|_| Wrong::TooLarge)?;
        if self.next_of("%").is_some() {
            let percent = Fraction::new(dividend, divisor)?;
            let most = Fraction::whole(PERCENT_MAX);
            return if most.is_below(percent)? {
                Err(Wrong::TooLarge)
            } else {
                Ok(Expression::Percent(percent))
            };
        }
        let shift = unit_shift(self.word()).ok_or(Wrong::Malformed)?;
        let number = Fraction::new(multiply(dividend, 1 << shift)?, divisor)?;
        if shift == 0 && divisor != 1 {
            return Ok(Expression::Factor(number));
        }
        Ok(Expression::Number(Fraction { exact: divisor == 1, ..number }))
    }

    /// The next of `characters`, if one of them is next.
    fn next_of(&mut self, characters: &str) -> Option<char> {
        self.skip_space();
        let next = self.rest.chars().next().filter(|next| characters.contains(*next))?;
        self.rest = &self.rest[next.len_utf8()..];
        Some(next)
    }

    fn expect(&mut self, character: &str) -> Result<(), Wrong> {
        self.next_of(character).map(drop).ok_or(Wrong::Malformed)
    }

    /// The letters that are next.
    fn word(&mut self) -> &'a str {
        self.skip_space();
        self.take(|c| c.is_ascii_alphabetic())
    }

    fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }
}

fn both(operator: Operator, left: Expression, right: Expression) -> Expression {
    Expression::Both(operator, left.into(), right.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RAM: u64 = 16 << 30;

    fn value(text: &str) -> Result<u64, Wrong> {
        Expression::parse(text)?.value(RAM)?.bytes()
    }

    #[test]
    fn the_usual_rules_hold() {
        for (text, bytes) in [
            ("ram", RAM),
            ("ram/2", RAM / 2),
            ("min(ram / 2, 8G)", 8 << 30),
            ("min(ram/2,4G)", 4 << 30),
            ("max(1G, 25%, ram - 14G)", 4 << 30),
            ("min(7)", 7),
            ("1+2*3", 7),
            ("(1+2)*3", 9),
            ("10-3-2", 5),
            ("100/5/2", 10),
            ("7/2", 3),
            ("2*7/2", 7),
            ("7/2*2", 7),
            ("ram * 0.5", RAM / 2),
            ("ram*1.5 - 50%", RAM),
            ("1 G + 1MiB", (1 << 30) + (1 << 20)),
            ("max(ram - 32G, 1M)", 1 << 20),
            ("(((((((((((((((1)))))))))))))))", 1),
        ] {
            assert_eq!(value(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_has_no_value_says_why() {
        for (text, wrong) in [
            ("", Wrong::Malformed),
            ("ram/", Wrong::Malformed),
            ("min", Wrong::Malformed),
            ("min()", Wrong::Malformed),
            ("min(1,)", Wrong::Malformed),
            ("min(1", Wrong::Malformed),
            ("1)", Wrong::Malformed),
            ("swap/2", Wrong::Malformed),
            ("ramram", Wrong::Malformed),
            ("ram ram", Wrong::Malformed),
            ("2ram", Wrong::Malformed),
            ("ram%", Wrong::Malformed),
            ("-1", Wrong::Malformed),
            ("1--1", Wrong::Malformed),
            ("1/0", Wrong::DividedByZero),
            ("ram/(ram-16G)", Wrong::DividedByZero),
            ("0/0", Wrong::DividedByZero),
            ("ram - 17G", Wrong::Negative),
            ("15E * 15E * 15E * 15E", Wrong::TooLarge),
            ("ram * 1E", Wrong::TooLarge),
            ("170141183460469231731687303715884105728", Wrong::TooLarge),
            ("10001%", Wrong::TooLarge),
            ("((((((((((((((((1))))))))))))))))", Wrong::Complex),
        ] {
            assert_eq!(value(text), Err(wrong), "{text}");
        }
        assert_eq!(value(&"1+".repeat(200)), Err(Wrong::Complex));
        assert_eq!(value(&"(".repeat(100)), Err(Wrong::Complex));
    }

    #[test]
    fn what_is_a_part_of_something_is_not_exact() {
        for (text, exact) in [
            ("4097", true),
            ("1G+1", true),
            ("min(3,4)*5", true),
            ("1.5G", false),
            ("1.0G", false),
            ("8/2", false),
            ("ram", false),
            ("1+5%", false),
        ] {
            assert_eq!(Expression::parse(text).unwrap().is_exact(), exact, "{text}");
        }
    }

    /// An expression and what it is worth, computed by other means: with numbers so small that these
    /// cannot overflow. What has a division by zero anywhere in it is worth no number.
    fn expressions() -> impl Strategy<Value = (String, f64)> {
        let leaf = prop_oneof![
            (0u32..1000).prop_map(|n| (n.to_string(), f64::from(n))),
            (0u32..64).prop_map(|n| (format!("{n}K"), f64::from(n) * 1024.0)),
            (0u32..4, 0u32..10).prop_map(|(n, tenth)| {
                (format!("{n}.{tenth}"), f64::from(n) + f64::from(tenth) / 10.0)
            }),
            (0u32..200).prop_map(|n| (format!("{n}%"), f64::from(n) / 100.0 * RAM as f64)),
            Just(("ram".to_owned(), RAM as f64)),
        ];
        leaf.prop_recursive(3, 8, 2, |inner| {
            (inner.clone(), inner, 0usize..6).prop_map(|((left, a), (right, b), operator)| {
                // These two would rather have a number than none.
                let either = |chosen: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { chosen };
                match operator {
                    0 => (format!("({left} + {right})"), a + b),
                    1 => (format!("({left}-{right})"), a - b),
                    2 => (format!("({left}*{right})"), a * b),
                    3 => (format!("({left} /{right})"), if b == 0.0 { f64::NAN } else { a / b }),
                    4 => (format!("min({left},{right})"), either(a.min(b))),
                    _ => (format!("max( {left} , {right} )"), either(a.max(b))),
                }
            })
        })
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[ 0-9.%+*/(),KMGramin-]{0,40}|.{0,40}") {
            let _ = value(&text);
        }

        #[test]
        fn an_expression_is_worth_what_it_says((text, expected) in expressions()) {
            match Expression::parse(&text).unwrap().value(RAM) {
                Ok(found) => {
                    let found = found.dividend as f64 / found.divisor as f64;
                    let error = (found - expected).abs();
                    // Differences of large numbers lose what is small beside those.
                    prop_assert!(error <= 1e-6 * expected.abs() + 0.1, "{text}: {found}, {expected}");
                }
                Err(Wrong::DividedByZero) => prop_assert!(expected.is_nan() || text.contains('-'), "{text}"),
                Err(wrong) => prop_assert_eq!(wrong, Wrong::TooLarge, "{}", text),
            }
        }
    }
}
