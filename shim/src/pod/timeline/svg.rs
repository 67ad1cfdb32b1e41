//! A timeline as a picture: one row a moment, whose bar is the time since the moment before.

use std::fmt::Write;

use super::{Moment, milliseconds};

/// Pixels.
const LABELS: f64 = 210.0;
const BARS: f64 = 620.0;
const NOTES: f64 = 170.0;
const HEAD: f64 = 74.0;
const ROW: f64 = 28.0;
const FOOT: f64 = 44.0;

/// Who was at work until a moment, and their colour: readable on white, and apart for the colour-blind.
const ACTORS: [(&str, &str); 5] = [
    ("shim", "#0072b2"),
    ("VMM", "#d55e00"),
    ("guest's kernel", "#009e73"),
    ("agent", "#cc79a7"),
    ("container", "#7f7f7f"),
];

/// Whose work ended with a moment: an index of [`ACTORS`].
fn actor(name: &str) -> usize {
    match name {
        "first guest instruction" => 1,
        "kernel to init" | "guest powered off" => 2,
        "agent dialled" | "agent ready" | "container created" | "container started" => 3,
        "container exited" => 4,
        _ => 0,
    }
}

/// Draws moments in the order of time. `title` may be any text.
pub(super) fn draw(moments: &[Moment], title: &str) -> String {
    let first = moments.first().map_or(0, |moment| moment.at_ns);
    let last = moments.last().map_or(0, |moment| moment.at_ns);
    // A run that ended at its first moment has no length; the axis needs one.
    let whole = milliseconds(last - first).max(0.001);
    let x = |at_ns: u64| LABELS + milliseconds(at_ns - first) / whole * BARS;
    let rows = moments.len().saturating_sub(1) as f64;
    let (width, height) = (LABELS + BARS + NOTES, HEAD + rows * ROW + FOOT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    text(
        &mut svg,
        (12.0, 26.0),
        "font-size=\"17\" font-weight=\"bold\"",
        title,
    );
    legend(&mut svg);
    axis(&mut svg, whole, HEAD + rows * ROW);
    let mut exits = 0;
    for (row, pair) in moments.windows(2).enumerate() {
        let [before, moment] = pair else { continue };
        let (left, right) = (x(before.at_ns), x(moment.at_ns));
        let top = HEAD + row as f64 * ROW;
        let middle = top + 18.0;
        let end = format!("x=\"{:.1}\" text-anchor=\"end\"", LABELS - 10.0);
        let _ = writeln!(
            svg,
            "<text {end} y=\"{middle}\">{}</text>",
            escape(moment.name)
        );
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\" fill=\"{}\"/>",
            top + 4.0,
            (right - left).max(1.0),
            ROW - 8.0,
            ACTORS[actor(moment.name)].1
        );
        let mut note = format!("{:.1} ms", milliseconds(moment.at_ns - before.at_ns));
        if let Some(count) = moment.exits {
            let _ = write!(note, ", {} exits", count.saturating_sub(exits));
            exits = count;
        }
        text(&mut svg, (right + 6.0, middle), "fill=\"#555\"", &note);
    }
    svg += "</svg>\n";
    svg
}

fn legend(svg: &mut String) {
    let mut at = 12.0;
    for (name, colour) in ACTORS {
        let _ = writeln!(
            svg,
            "<rect x=\"{at:.1}\" y=\"42\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{colour}\"/>"
        );
        text(svg, (at + 18.0, 53.0), "", name);
        at += 40.0 + 7.5 * name.len() as f64;
    }
}

/// Lines at round numbers of ms, through all rows.
fn axis(svg: &mut String, whole: f64, bottom: f64) {
    let step = step(whole);
    let mut count = 0;
    while f64::from(count) * step <= whole {
        let ms = f64::from(count) * step;
        let x = LABELS + ms / whole * BARS;
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{bottom:.1}\" stroke=\"#ddd\"/>",
            HEAD - 6.0
        );
        let label = match step {
            1000.0.. => format!("{:.0} s", ms / 1000.0),
            1.0.. => format!("{ms:.0} ms"),
            _ => format!("{ms:.3} ms"),
        };
        let middle = "text-anchor=\"middle\" fill=\"#555\"";
        text(svg, (x, bottom + 18.0), middle, &label);
        count += 1;
    }
}

/// 1, 2 or 5 times a power of ten, so that there are 4 to 10 steps.
fn step(whole: f64) -> f64 {
    let power = 10.0_f64.powf((whole / 10.0).log10().floor());
    let fits = |step: &f64| whole / step <= 10.0;
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    steps.into_iter().find(fits).unwrap_or(whole)
}

fn text(svg: &mut String, (x, y): (f64, f64), style: &str, text: &str) {
    let text = escape(text);
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{text}</text>");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(name: &'static str, ms: u64, exits: Option<u64>) -> Moment {
        Moment {
            name,
            at_ns: 1_000_000_000 + ms * 1_000_000,
            exits,
        }
    }

    #[test]
    fn each_moment_but_the_first_is_a_bar_as_long_as_it_took() {
        let svg = draw(
            &[
                moment("command start", 0, None),
                moment("vmm start", 25, Some(0)),
                moment("first guest instruction", 75, Some(3)),
                moment("agent ready", 100, None),
            ],
            "<b> & co",
        );
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("&lt;b&gt; &amp; co"));
        // A quarter, a half and a quarter of the bars' room.
        for (at, width) in [(210.0, 155.0), (365.0, 310.0), (675.0, 155.0)] {
            let bar = format!("x=\"{at:.1}\" y=");
            let line = svg
                .lines()
                .find(|line| line.contains(&bar) && line.contains("rx=\"2\""));
            let line = line.unwrap_or_else(|| panic!("no bar at {at}: {svg}"));
            assert!(line.contains(&format!("width=\"{width:.1}\"")), "{line}");
        }
        assert!(svg.contains("50.0 ms, 3 exits"), "{svg}");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn a_run_that_came_to_nothing_is_drawn_too() {
        for moments in [vec![], vec![moment("command start", 0, None)]] {
            let svg = draw(&moments, "x");
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"));
        }
    }

    #[test]
    fn the_axis_has_few_round_steps() {
        for (whole, wanted) in [(0.001, 0.0001), (3.0, 0.5), (99.0, 10.0), (1300.0, 200.0)] {
            assert!(
                (step(whole) - wanted).abs() < 1e-9,
                "{whole}: {}",
                step(whole)
            );
            assert!((4.0..=10.0).contains(&(whole / step(whole))), "{whole}");
        }
    }
}
