use super::*;

fn sym(name: &str) -> Dim {
    Dim::from(Sym::new(name).unwrap())
}

fn c(value: i64) -> Dim {
    Dim::from(value)
}

fn decls() -> Vec<SymDecl> {
    ["a", "b"]
        .iter()
        .map(|n| SymDecl { sym: Sym::new(n).unwrap(), min: 1, max: 64, multiple: 1, hint: None })
        .collect()
}

#[test]
fn equal_sums_of_products_have_one_form() {
    let (a, b) = (sym("a"), sym("b"));
    let left = a.add(&b).mul(&a.sub(&b));
    let right = a.mul(&a).sub(&b.mul(&b));
    assert_eq!(left, right);
    assert_eq!(left.to_string(), "$a*$a - $b*$b");
    assert_eq!(a.add(&b).sub(&a), b);
    assert_eq!(c(3).mul(&a).add(&c(2)).to_string(), "3*$a + 2");
}

#[test]
fn ceildiv_keeps_exact_parts_outside() {
    let a = sym("a");
    assert_eq!(a.mul(&c(64)).ceil_div(32), a.mul(&c(2)));
    assert_eq!(a.mul(&c(4)).add(&c(64)).ceil_div(32).to_string(), "ceildiv(4*$a, 32) + 2");
    assert_eq!(c(-7).ceil_div(2), c(-3));
    assert_eq!(c(7).ceil_div(2), c(4));
}

#[test]
fn dominated_arguments_of_max_vanish() {
    let (a, b) = (sym("a"), sym("b"));
    assert_eq!(a.mul(&c(4)).max_of(&a.mul(&c(2))), a.mul(&c(4)));
    let both = a.max_of(&b).max_of(&c(0));
    assert_eq!(both.to_string(), "max($a, $b)");
    assert_eq!(both.max_of(&a.add(&b)), a.add(&b));
}

#[test]
fn monotone_needs_positive_coefficients_and_factors() {
    let (a, b) = (sym("a"), sym("b"));
    let decls = decls();
    assert!(a.mul(&b).add(&c(-5)).is_monotone(&decls));
    assert!(!a.sub(&b).is_monotone(&decls));
    assert!(a.sub(&c(1)).ceil_div(2).mul(&b).is_monotone(&decls));
    assert!(!a.sub(&c(9)).ceil_div(2).mul(&b).is_monotone(&decls));
}

#[test]
fn evaluates_and_reports_overflow_and_unbound() {
    let (a, b) = (sym("a"), sym("b"));
    let mut bindings = Bindings::new();
    bindings.set(Sym::new("a").unwrap(), 10);
    assert_eq!(a.mul(&c(3)).ceil_div(4).eval(&bindings), Some(8));
    assert_eq!(a.add(&b).eval(&bindings), None);
    assert_eq!(a.mul(&c(i64::MAX)).eval(&bindings), None);
    assert_eq!(a.sub(&c(11)).extent(&bindings), None);
}
