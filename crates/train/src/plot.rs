use std::fmt::Write;

/// A line of a [`chart`].
pub struct Line {
    /// Written in the line's colour.
    pub name: String,
    /// (x, y), x at least 0; what is not finite is left out.
    pub points: Vec<(f64, f64)>,
}

/// A picture (SVG) of loss over steps: `train` and `held_out` are (step, loss) points.
pub fn loss_curve(title: &str, train: &[(u64, f64)], held_out: &[(u64, f64)]) -> String {
    // No more points than there are pixels: means of as many steps each as it takes.
    let line = |name: &str, points: &[(u64, f64)]| Line {
        name: name.into(),
        points: points.chunks(points.len().div_ceil(POINTS).max(1)).map(mean).collect(),
    };
    chart(title, "step", &[line("training", train), line("held out", held_out)])
}

/// Points of a curve at most.
const POINTS: usize = 700;

fn mean(points: &[(u64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    (points.iter().map(|p| p.0 as f64).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n)
}

/// A picture (SVG) of lines over x from 0.
pub fn chart(title: &str, x_label: &str, lines: &[Line]) -> String {
    const W: f64 = 800.0;
    const H: f64 = 450.0;
    const LEFT: f64 = 60.0;
    const TOP: f64 = 40.0;
    const BOTTOM: f64 = 50.0;
    const COLOURS: [&str; 10] =
        ["#7aa6d8", "#c0392b", "#27ae60", "#8e44ad", "#e67e22", "#16a085", "#2c3e50", "#b7950b", "#d35fa0", "#7f8c8d"];
    let finite = || lines.iter().flat_map(|l| &l.points).filter(|p| p.1.is_finite());
    let steps = finite().map(|p| p.0).fold(1.0, f64::max);
    let low = finite().map(|p| p.1).fold(f64::INFINITY, f64::min).min(1e9);
    let high = finite().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max).max(low + 0.1);
    let tick = |range: f64| {
        let rough = range / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&t| t >= rough).unwrap_or(rough)
    };
    let (dx, dy) = (tick(steps).max(1.0), tick(high - low));
    let bottom = (low / dy).floor() * dy;
    let x = |s: f64| LEFT + (W - LEFT - 20.0) * s / steps;
    let y = |l: f64| H - BOTTOM - (H - TOP - BOTTOM) * (l - bottom) / (high - bottom);
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {W} {H}' font-family='sans-serif' font-size='13'>\n\
         <rect width='{W}' height='{H}' fill='white'/>\n<text x='{LEFT}' y='24' font-size='16'>{}</text>\n",
        escape(title)
    );
    let mut level = bottom;
    while level <= high + dy * 1e-6 {
        let at = y(level);
        let _ = writeln!(
            svg,
            "<line x1='{LEFT}' x2='{}' y1='{at:.1}' y2='{at:.1}' stroke='#ddd'/><text x='{}' y='{:.1}' text-anchor='end'>{:.*}</text>",
            W - 20.0,
            LEFT - 6.0,
            at + 4.0,
            if dy < 0.1 { 2 } else { 1 },
            level
        );
        level += dy;
    }
    let mut step = 0.0;
    while step <= steps {
        let _ = writeln!(svg, "<text x='{:.1}' y='{}' text-anchor='middle'>{step}</text>", x(step), H - BOTTOM + 18.0);
        step += dx;
    }
    let _ = writeln!(svg, "<text x='{}' y='{}' text-anchor='middle'>{}</text>", W / 2.0, H - 10.0, escape(x_label));
    for (i, Line { name, points }) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let line: Vec<String> =
            points.iter().filter(|p| p.1.is_finite()).map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let _ =
            writeln!(svg, "<polyline fill='none' stroke='{colour}' stroke-width='1.6' points='{}'/>", line.join(" "));
        let (at, down) = (W - 30.0, TOP + 18.0 * (i as f64 + 1.0));
        let _ = writeln!(svg, "<text x='{at}' y='{down}' fill='{colour}' text-anchor='end'>{}</text>", escape(name));
    }
    svg + "</svg>\n"
}

/// A picture (SVG) of shares from 0 to 1 in a grid, each cell with its percentage; `cells[row][column]`, `None` where there is none.
///
/// Colours go from light to dark, so that they are told apart without seeing hues and in print; numbers stand out in all of them.
pub fn heat_map(
    title: &str, x_label: &str, columns: &[String], y_label: &str, rows: &[String], cells: &[Vec<Option<f64>>],
) -> String {
    const CELL: [f64; 2] = [72.0, 34.0];
    const LEFT: f64 = 90.0;
    const TOP: f64 = 40.0;
    // The title needs its width too.
    let w = (LEFT + CELL[0] * columns.len() as f64 + 20.0).max(2.0 * 20.0 + 9.0 * title.chars().count() as f64);
    let h = TOP + CELL[1] * rows.len() as f64 + 50.0;
    let (x, y) = (|i: usize| LEFT + CELL[0] * i as f64, |i: usize| TOP + CELL[1] * i as f64);
    let (middle, line) = (CELL[0] / 2.0, CELL[1] / 2.0 + 5.0);
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {w} {h}' font-family='sans-serif' font-size='13'>\n\
         <rect width='{w}' height='{h}' fill='white'/>\n<text x='20' y='24' font-size='16'>{}</text>\n\
         <text transform='translate(22 {}) rotate(-90)' text-anchor='middle'>{}</text>\n\
         <text x='{}' y='{}' text-anchor='middle'>{}</text>\n",
        escape(title),
        (TOP + y(rows.len())) / 2.0,
        escape(y_label),
        (LEFT + x(columns.len())) / 2.0,
        h - 10.0,
        escape(x_label)
    );
    for (j, name) in columns.iter().enumerate() {
        let (x, y) = (x(j) + middle, y(rows.len()) + 18.0);
        let _ = writeln!(svg, "<text x='{x}' y='{y}' text-anchor='middle'>{}</text>", escape(name));
    }
    for (i, (name, row)) in rows.iter().zip(cells).enumerate() {
        let _ = writeln!(svg, "<text x='{}' y='{}' text-anchor='end'>{}</text>", LEFT - 6.0, y(i) + line, escape(name));
        for (j, cell) in row.iter().enumerate() {
            let (fill, ink) = cell.map_or(([238; 3], [0; 3]), shade);
            let text = cell.map_or("-".into(), |share| ((1000.0 * share).round() / 10.0).to_string());
            let (x, y, [w, h]) = (x(j), y(i), CELL);
            let _ = writeln!(
                svg,
                "<rect x='{x}' y='{y}' width='{w}' height='{h}' fill='{}' stroke='white'/>\
                 <text x='{}' y='{}' fill='{}' text-anchor='middle'>{text}</text>",
                hex(fill),
                x + middle,
                y + line,
                hex(ink)
            );
        }
    }
    svg + "</svg>\n"
}

/// Colour of a share, from pale yellow to dark blue, and of text on it.
fn shade(share: f64) -> ([u8; 3], [u8; 3]) {
    const ENDS: [[f64; 3]; 2] = [[255.0, 249.0, 219.0], [11.0, 54.0, 107.0]];
    let share = share.clamp(0.0, 1.0);
    let fill = [0, 1, 2].map(|c| (ENDS[0][c] + (ENDS[1][c] - ENDS[0][c]) * share).round() as u8);
    // Black on what is lighter than the shade on which both are as legible.
    (fill, if luminance(fill) > 0.179 { [0; 3] } else { [255; 3] })
}

/// Relative luminance of a colour, 0 to 1, as WCAG has it.
fn luminance(colour: [u8; 3]) -> f64 {
    let linear = |c: u8| {
        let c = f64::from(c) / 255.0;
        if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
    };
    let [r, g, b] = colour.map(linear);
    0.2126 * r + 0.7152 * g + 0.0722 * b
}

fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heat_map_has_a_legible_number_in_every_cell() {
        let names = |n: usize| (0..n).map(|i| format!("<{i}")).collect::<Vec<_>>();
        let cells = vec![vec![Some(0.0), Some(0.504), None], vec![Some(1.0), Some(0.25), Some(2.0)]];
        let svg = heat_map("a & b", "x", &names(3), "y", &names(2), &cells);
        assert_eq!(svg.matches("<rect").count(), 1 + 6);
        for says in [">0<", ">50.4<", ">-<", ">100<", ">25<", "a &amp; b", ">&lt;2<", "#fff9db", "#0b366b", "#eeeeee"] {
            assert!(svg.contains(says), "{says}: {svg}");
        }
        // Contrast of at least 4.5 (WCAG AA), and darker is more.
        let mut before = f64::INFINITY;
        for share in 0..=100 {
            let (fill, ink) = shade(f64::from(share) / 100.0);
            let (a, b) = (luminance(fill), luminance(ink));
            assert!((a.max(b) + 0.05) / (a.min(b) + 0.05) >= 4.5, "{share}%");
            assert!(a < before, "{share}%");
            before = a;
        }
        heat_map("", "", &[], "", &[], &[]);
    }

    #[test]
    fn curves_stay_inside_the_picture() {
        let train: Vec<(u64, f64)> = (0..50).map(|i| (i, 5.0 / (i + 1) as f64)).chain([(50, f64::NAN)]).collect();
        let svg = loss_curve("a < b", &train, &[(0, 5.5), (40, 1.0)]);
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
        let mut points = 0;
        for line in svg.split("points='").skip(1) {
            for p in line.split('\'').next().unwrap().split(' ') {
                let (x, y) = p.split_once(',').unwrap();
                assert!(
                    (60.0..=780.0).contains(&x.parse().unwrap()) && (40.0..=400.0).contains(&y.parse::<f64>().unwrap())
                );
                points += 1;
            }
        }
        assert_eq!(points, 52);
        loss_curve("", &[], &[]);

        // Long ones are thinned, not cut.
        let long: Vec<(u64, f64)> = (0..14_001).map(|i| (i, if i == 14_000 { 1.0 } else { 2.0 })).collect();
        let svg = loss_curve("", &long, &[]);
        let drawn: Vec<&str> = svg.split("points='").nth(1).unwrap().split('\'').next().unwrap().split(' ').collect();
        assert!((600..=POINTS).contains(&drawn.len()) && drawn.last().unwrap().starts_with("780"));
    }
}
