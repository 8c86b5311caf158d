//! The figures that have a target, and whether they meet it.

use super::table::Table;

/// What is asked of a figure.
#[derive(Clone, Copy)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

/// One figure that has a target.
pub struct Figure {
    pub name: String,
    pub ours: f64,
    /// The same of QEMU, or of fio where the target speaks of it.
    pub theirs: Option<f64>,
    pub limit: Limit,
}

impl Figure {
    pub fn new(name: impl Into<String>, ours: f64, theirs: impl Into<Option<f64>>, limit: Limit) -> Figure {
        Figure { name: name.into(), ours, theirs: theirs.into(), limit }
    }

    /// `met`, or by how much it is missed.
    fn verdict(&self) -> String {
        let (excess, target) = match self.limit {
            Limit::AtMost(target) => (self.ours - target, target),
            Limit::AtLeast(target) => (target - self.ours, target),
        };
        match excess {
            ..=0.0 => "met".to_owned(),
            _ if target == 0.0 => format!("missed by {}", short(excess)),
            _ => format!("missed by {:.0} %", 100.0 * excess / target),
        }
    }
}

/// A number with as many digits as mean something.
fn short(number: f64) -> String {
    match number {
        100.0.. => format!("{number:.0}"),
        10.0..100.0 => format!("{number:.1}"),
        _ if number.fract() == 0.0 => format!("{number:.0}"),
        _ => format!("{number:.2}"),
    }
}

/// Prints the figures, if there are any.
pub fn print(figures: &[Figure]) {
    if figures.is_empty() {
        return;
    }
    let mut table = Table::new(&["", "loopvisor", "QEMU", "target", ""]);
    for figure in figures {
        let target = match figure.limit {
            Limit::AtMost(target) => format!("at most {}", short(target)),
            Limit::AtLeast(target) => format!("at least {}", short(target)),
        };
        let theirs = figure.theirs.map_or("-".to_owned(), short);
        table.row([figure.name.clone(), short(figure.ours), theirs, target, figure.verdict()]);
    }
    table.print("Targets:");
}
