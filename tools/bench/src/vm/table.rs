//! Tables of text, in markdown.

/// Rows below a head.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&str]) -> Table {
        Table { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints it under a sentence.
    pub fn print(&self, sentence: &str) {
        println!("{sentence}\n");
        for (i, row) in self.rows.iter().enumerate() {
            println!("| {} |", row.join(" | "));
            if i == 0 {
                println!("|---|{}", "---:|".repeat(row.len() - 1));
            }
        }
        println!();
    }
}

/// The median of the samples.
pub fn median(samples: &[f64]) -> f64 {
    crate::stats::percentile(&mut samples.to_vec(), 50)
}

/// The least of the samples.
pub fn least(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The greatest of the samples.
pub fn greatest(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}
