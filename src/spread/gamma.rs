//! The chi-square distribution's upper tail, by the regularised incomplete
//! gamma function.
//!
//! Pure. The series converges fast below `a + 1`, the continued fraction
//! above; both stop at a fixed number of terms, far above what 64 slots need.

/// Terms after which a sum is taken as it stands. Near `x = a` about
/// `6 * sqrt(a)` are needed: enough for 100,000 degrees of freedom.
const TERMS: u32 = 4096;

/// The odds that a chi-square variable with so many degrees of freedom is at
/// least `chi_square`. With no degree of freedom it is always 0, so 1.0.
pub fn upper_tail(chi_square: f64, degrees: u32) -> f64 {
    if degrees == 0 || chi_square <= 0.0 {
        return 1.0;
    }
    let (a, x) = (f64::from(degrees) / 2.0, chi_square / 2.0);
    // x^a e^-x / Gamma(a), the factor before both expansions.
    let front = (a * x.ln() - x - ln_gamma_of_half(degrees)).exp();
    let tail = if x < a + 1.0 { 1.0 - front * series(a, x) } else { front * fraction(a, x) };
    tail.clamp(0.0, 1.0)
}

/// ln Gamma(degrees / 2), exactly by Gamma(z + 1) = z Gamma(z) from
/// Gamma(1) = 1 or Gamma(1/2) = sqrt(pi).
fn ln_gamma_of_half(degrees: u32) -> f64 {
    let odd = degrees % 2 == 1;
    let mut sum = if odd { std::f64::consts::PI.sqrt().ln() } else { 0.0 };
    let mut z = if odd { 0.5 } else { 1.0 };
    while z < f64::from(degrees) / 2.0 {
        sum += f64::ln(z);
        z += 1.0;
    }
    sum
}

/// sum of x^n / (a (a+1) ... (a+n)): the lower tail's series.
fn series(a: f64, x: f64) -> f64 {
    let mut term = 1.0 / a;
    let mut sum = term;
    for n in 1..TERMS {
        term *= x / (a + f64::from(n));
        sum += term;
        if term < sum * f64::EPSILON {
            break;
        }
    }
    sum
}

/// The upper tail's continued fraction, evaluated from the front by the
/// modified Lentz method.
fn fraction(a: f64, x: f64) -> f64 {
    const TINY: f64 = 1e-300;
    let away_from_zero = |v: f64| if v.abs() < TINY { TINY } else { v };
    let mut b = x + 1.0 - a;
    let mut c = 1.0 / TINY;
    let mut d = 1.0 / away_from_zero(b);
    let mut result = d;
    for n in 1..TERMS {
        let n = f64::from(n);
        let numerator = -n * (n - a);
        b += 2.0;
        d = 1.0 / away_from_zero(numerator * d + b);
        c = away_from_zero(b + numerator / c);
        result *= d * c;
        if (d * c - 1.0).abs() < f64::EPSILON {
            break;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::upper_tail;

    /// Critical values as printed in statistical tables: degrees of freedom,
    /// upper tail, chi-square.
    const TABLE: &[(u32, f64, f64)] = &[
        (1, 0.05, 3.841_458_820_694_124),
        (1, 0.001, 10.827_566_170_662_733),
        (2, 0.05, 5.991_464_547_107_979),
        (2, 0.01, 9.210_340_371_976_18),
        (3, 0.95, 0.351_846_317_749_271_6),
        (3, 0.05, 7.814_727_903_251_179),
        (3, 0.001, 16.266_236_196_238_13),
        (5, 0.01, 15.086_272_469_388_987),
        (7, 0.05, 14.067_140_449_340_167),
        (10, 0.95, 3.940_299_136_119_06),
        (10, 0.05, 18.307_038_053_275_146),
        (15, 0.001, 37.697_298_218_353_82),
        (30, 0.05, 43.772_971_825_742_19),
        (63, 0.05, 82.528_726_544_718_1),
        (100, 0.05, 124.342_113_404_004_08),
    ];

    #[test]
    fn the_tail_agrees_with_the_printed_tables() {
        for &(degrees, tail, chi_square) in TABLE {
            let got = upper_tail(chi_square, degrees);
            assert!((got - tail).abs() < 1e-9, "df {degrees}: {got} instead of {tail}");
        }
    }

    #[test]
    fn even_degrees_agree_with_the_closed_form() {
        // e^-h * sum of h^k / k! for k < degrees / 2, h = chi_square / 2.
        for degrees in (2..=64).step_by(2) {
            for h in [0.01, 0.5, 1.0, 7.0, 31.0, 32.5, 80.0, 300.0] {
                let (mut term, mut sum) = (1.0, 1.0);
                for k in 1..degrees / 2 {
                    term *= h / f64::from(k);
                    sum += term;
                }
                let (want, got) = (f64::exp(-h) * sum, upper_tail(2.0 * h, degrees));
                assert!((got - want).abs() <= 1e-12 + 1e-9 * want, "df {degrees} h {h}: {got}, {want}");
            }
        }
    }

    #[test]
    fn the_tail_falls_from_one_to_zero_without_a_step_back() {
        for degrees in [1, 2, 3, 7, 63, 1000] {
            let mut last = upper_tail(0.0, degrees);
            assert_eq!(last, 1.0);
            for step in 1..4000 {
                let next = upper_tail(f64::from(step) * 0.5, degrees);
                assert!(next <= last + 1e-12 && next >= 0.0, "df {degrees} step {step}");
                last = next;
            }
            assert!(last < 0.5);
        }
    }

    #[test]
    fn no_degree_of_freedom_leaves_nothing_to_chance() {
        assert_eq!(upper_tail(0.0, 0), 1.0);
        assert_eq!(upper_tail(5.0, 0), 1.0);
    }
}
