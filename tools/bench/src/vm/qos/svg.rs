//! A panel of a picture as SVG text: axes, lines, dots and words. It knows nothing of what is drawn.

use std::fmt::Write;

const GRID: &str = "#e2e2e2";
const INK: &str = "#222222";

/// What an axis covers; its ticks are given, each with its label.
pub struct Axis {
    pub name: &'static str,
    pub from: f64,
    pub to: f64,
    pub logarithmic: bool,
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Where a value is, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.logarithmic { value.ln() } else { value };
        (scale(value) - scale(self.from)) / (scale(self.to) - scale(self.from))
    }
}

/// The rectangle inside the axes, in pixels.
pub struct Panel {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
    pub x: Axis,
    pub y: Axis,
}

/// How a series looks.
#[derive(Clone, Copy)]
pub struct Style {
    pub colour: &'static str,
    /// A square and not a circle, so that the colour need not be told.
    pub square: bool,
    /// Half its width.
    pub radius: f64,
}

/// The text of a picture as it grows.
pub struct Svg(String);

impl Svg {
    /// An empty picture, white: it is read on dark pages too.
    pub fn new(width: u32, height: u32) -> Svg {
        Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"Helvetica, Arial, sans-serif\" fill=\"{INK}\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        ))
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }

    /// Words at a place; `attributes` say how they stand.
    pub fn words(&mut self, x: f64, y: f64, size: u32, attributes: &str, words: &str) {
        let words = words.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(self.0, "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" {attributes}>{words}</text>");
    }

    /// A dashed line, in pixels: what would be right.
    pub fn ideal(&mut self, x: f64, y: f64, width: f64) {
        let attributes = format!("stroke=\"{INK}\" stroke-width=\"1.5\" stroke-dasharray=\"6 4\"");
        self.line((x, y), (x + width, y), &attributes);
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), attributes: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(self.0, "<path d=\"M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\" fill=\"none\" {attributes}/>");
    }

    /// One dot, in pixels.
    pub fn dot(&mut self, x: f64, y: f64, style: Style) {
        let Style { colour, square, radius } = style;
        let _ = if square {
            let (x, y, side) = (x - radius, y - radius, 2.0 * radius);
            writeln!(self.0, "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side}\" height=\"{side}\" fill=\"{colour}\"/>")
        } else {
            writeln!(self.0, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"/>")
        };
    }
}

impl Panel {
    /// Where a pair of values is, in pixels.
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.left + self.x.share(x) * self.width, self.top + (1.0 - self.y.share(y)) * self.height)
    }

    /// Grid, axes, ticks and names, under a title.
    pub fn frame(&self, svg: &mut Svg, title: &str) {
        let grid = format!("stroke=\"{GRID}\"");
        for (value, label) in &self.x.ticks {
            let (x, bottom) = self.place((*value, self.y.from));
            svg.line((x, self.top), (x, bottom), &grid);
            svg.words(x, bottom + 20.0, 13, "text-anchor=\"middle\"", label);
        }
        for (value, label) in &self.y.ticks {
            let (left, y) = self.place((self.x.from, *value));
            svg.line((left, y), (left + self.width, y), &grid);
            svg.words(left - 8.0, y + 4.5, 13, "text-anchor=\"end\"", label);
        }
        let (left, bottom) = (self.left, self.top + self.height);
        let ink = format!("stroke=\"{INK}\"");
        svg.line((left, self.top), (left, bottom), &ink);
        svg.line((left, bottom), (left + self.width, bottom), &ink);
        svg.words(left, self.top - 18.0, 15, "font-weight=\"bold\"", title);
        svg.words(left + self.width / 2.0, bottom + 44.0, 13, "text-anchor=\"middle\"", self.x.name);
        let (x, y) = (left - 48.0, self.top + self.height / 2.0);
        svg.words(x, y, 13, &format!("text-anchor=\"middle\" transform=\"rotate(-90 {x:.1} {y:.1})\""), self.y.name);
    }

    /// The line of what would be right, at one height.
    pub fn ideal(&self, svg: &mut Svg, y: f64) {
        let (left, y) = self.place((self.x.from, y));
        svg.ideal(left, y, self.width);
    }

    /// The points, joined if asked for.
    pub fn series(&self, svg: &mut Svg, points: &[(f64, f64)], style: Style, joined: bool) {
        for pair in points.windows(2).filter(|_| joined) {
            let attributes = format!("stroke=\"{}\" stroke-width=\"2\"", style.colour);
            svg.line(self.place(pair[0]), self.place(pair[1]), &attributes);
        }
        for &point in points {
            let (x, y) = self.place(point);
            svg.dot(x, y, style);
        }
    }
}
