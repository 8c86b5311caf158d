//! `docs/img/qos.svg`: how far the rate is from the limit at each rate, and a run's first seconds request by request.

use std::fs;
use std::path::Path;

use super::super::Result;
use super::super::programs::ROOT;
use super::MONITORS;
use super::svg::{Axis, Panel, Style, Svg};

/// How much of the run is drawn request by request.
pub const SECONDS: u64 = 5;
/// The limit of that run, requests a second.
pub const IOPS: u64 = 100;

const FILE: &str = "docs/img/qos.svg";
const SIZE: (u32, u32) = (960, 520);
/// In the order of the monitors.
const STYLES: [Style; 2] =
    [Style { colour: "#0b62c4", square: false, radius: 5.0 }, Style { colour: "#d1560a", square: true, radius: 4.5 }];

/// The two values of a dot.
pub type Point = (f64, f64);

/// Draws the errors in per cent over the rates asked for, and how many requests too many are done over the seconds.
pub fn write(errors: &[Vec<Point>; 2], ahead: &[Vec<Point>; 2]) -> Result<()> {
    let path = Path::new(ROOT).join(FILE);
    fs::create_dir_all(path.parent().ok_or("no directory")?)?;
    fs::write(&path, draw(errors, ahead)).map_err(|error| format!("{FILE}: {error}"))?;
    eprintln!("loopvisor-bench: drawn: {FILE}");
    Ok(())
}

fn draw(errors: &[Vec<Point>; 2], ahead: &[Vec<Point>; 2]) -> String {
    let mut svg = Svg::new(SIZE.0, SIZE.1);
    svg.words(24.0, 32.0, 19, "font-weight=\"bold\"", "A disk limited to so many requests a second");
    let mut x = 24.0;
    for (monitor, style) in MONITORS.into_iter().zip(STYLES) {
        svg.dot(x + 6.0, 53.0, style);
        svg.words(x + 18.0, 58.0, 14, "", monitor.name());
        x += 110.0;
    }
    svg.ideal(x, 53.0, 30.0);
    svg.words(x + 38.0, 58.0, 14, "", "exactly as asked");
    let decades = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5];
    let labels = ["1", "10", "100", "1,000", "10,000", "100,000"];
    let errors_panel = Panel {
        left: 80.0,
        top: 120.0,
        width: 380.0,
        height: 330.0,
        x: Axis {
            name: "asked for, requests/s",
            from: 0.7,
            to: 140_000.0,
            logarithmic: true,
            ticks: decades.into_iter().zip(labels.map(str::to_owned)).collect(),
        },
        y: linear("achieved in 10 s, % more or less than asked", errors, 1.0),
    };
    errors_panel.frame(&mut svg, "Asked and achieved");
    errors_panel.ideal(&mut svg, 0.0);
    for (points, style) in errors.iter().zip(STYLES) {
        errors_panel.series(&mut svg, points, style, true);
    }
    let ahead_panel = Panel {
        left: 550.0,
        x: Axis {
            name: "seconds since the first request",
            from: 0.0,
            to: SECONDS as f64,
            logarithmic: false,
            ticks: (0..=SECONDS).map(|s| (s as f64, s.to_string())).collect(),
        },
        y: linear("requests done, more or less than due", ahead, 2.0),
        ..errors_panel
    };
    ahead_panel.frame(&mut svg, &format!("Each request of {SECONDS} s at {IOPS} a second"));
    ahead_panel.ideal(&mut svg, 0.0);
    for (points, style) in ahead.iter().zip(STYLES) {
        ahead_panel.series(&mut svg, points, Style { radius: style.radius * 0.3, ..style }, false);
    }
    svg.finish()
}

/// An axis that has room for all points, and for `least` on both sides of zero.
fn linear(name: &'static str, series: &[Vec<Point>; 2], least: f64) -> Axis {
    let values = || series.iter().flatten().map(|&(_, y)| y);
    let (from, to) = (values().fold(-least, f64::min), values().fold(least, f64::max));
    let step = [0.2, 0.5, 1.0, 2.0, 5.0, 10.0].into_iter().find(|step| (to - from) / step <= 12.0).unwrap_or(20.0);
    let (from, to) = ((from / step).floor(), (to / step).ceil());
    let ticks = (from as i64..=to as i64).map(|n| n as f64 * step);
    let digits = usize::from(step < 1.0);
    let label = |value: f64| match value {
        0.0 => "0".to_owned(),
        0.0.. => format!("+{value:.digits$}"),
        _ => format!("\u{2212}{:.digits$}", value.abs()),
    };
    let ticks = ticks.map(|value| (value, label(value))).collect();
    Axis { name, from: from * step, to: to * step, logarithmic: false, ticks }
}
