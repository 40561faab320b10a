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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    #[test]
    fn curves_stay_inside_the_picture() {
        let train: Vec<(u64, f64)> = (0..50).map(|i| (i, 5.0 / (i + 1) as f64)).chain([(50, f64::NAN)]).collect();
        let svg = super::loss_curve("a < b", &train, &[(0, 5.5), (40, 1.0)]);
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
        super::loss_curve("", &[], &[]);

        // Long ones are thinned, not cut.
        let long: Vec<(u64, f64)> = (0..14_001).map(|i| (i, if i == 14_000 { 1.0 } else { 2.0 })).collect();
        let svg = super::loss_curve("", &long, &[]);
        let drawn: Vec<&str> = svg.split("points='").nth(1).unwrap().split('\'').next().unwrap().split(' ').collect();
        assert!((600..=super::POINTS).contains(&drawn.len()) && drawn.last().unwrap().starts_with("780"));
    }
}
