//! How `top` looks: a headline, three tables, a line of keys. No meaning is in
//! a colour alone: states are words, the focus has a double border.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Cell as TableCell, Clear, Paragraph, Row, Table as TableWidget};

use super::Top;
use super::rows::{Cell, Pane};

const KEYS: &str = "q quit  Tab pane  s sort  r reverse  arrows scroll  p pause  ? help";

const HELP: &[(&str, &str)] = &[
    ("Tab, 1, 2, 3", "the pane that the other keys act on"),
    ("s > Right, < Left", "sort by the next column, the one before"),
    ("r", "reverse the order"),
    ("Up Down PgUp PgDn Home", "scroll"),
    ("p, Space", "pause, go on"),
    ("q, Esc, Ctrl-C", "quit"),
    ("?, h", "this help"),
];

/// Draws everything.
pub fn draw(top: &Top, frame: &mut Frame) {
    let areas = Layout::vertical([Constraint::Length(2), Constraint::Min(0), Constraint::Length(1)]);
    let [head, body, foot] = areas.areas(frame.area());
    headline(top, frame, head);
    // A pane with few rows leaves its room to the others, the focus gets most.
    let tables = Pane::ALL.map(|pane| (pane, top.table(pane)));
    let heights =
        heights(body.height, tables.each_ref().map(|(_, table)| table.rows.len()), top.focus as usize);
    let panes: [Rect; 3] = Layout::vertical(heights.map(Constraint::Length)).areas(body);
    for ((pane, table), area) in tables.into_iter().zip(panes) {
        if area.height > 1 {
            draw_pane(top, frame, area, pane, &table);
        }
    }
    let keys = Style::new().add_modifier(Modifier::DIM);
    frame.render_widget(Paragraph::new(KEYS).style(keys), foot);
    if top.help {
        help(frame);
    }
}

fn headline(top: &Top, frame: &mut Frame, area: Rect) {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut first = vec![Span::styled("evenkeel", bold)];
    if let Some((status, _)) = &top.newer {
        first.push(Span::raw(format!(
            " {}  pid {}  generation {}  {}",
            status.version, status.pid, status.generation, status.config_path
        )));
    }
    let second = match (&top.silence, top.paused) {
        (Some(silence), _) => Line::styled(format!("NO ANSWER: {silence}"), alarm()),
        (None, true) => Line::styled("PAUSED: p goes on", Style::new().fg(Color::Yellow)),
        (None, false) => {
            Line::raw(format!("every {} s from {}", top.interval.as_secs_f64(), top.socket.display()))
        }
    };
    frame.render_widget(Paragraph::new(vec![Line::from(first), second]), area);
}

fn draw_pane(top: &Top, frame: &mut Frame, area: Rect, pane: Pane, table: &super::Table) {
    let view = top.views[pane as usize];
    let focused = pane == top.focus;
    let room = usize::from(area.height.saturating_sub(3));
    let offset = view.offset.min(table.rows.len().saturating_sub(room.max(1)));
    let shown = table.rows.len().min(offset + room);
    let title = match (table.rows.len(), shown - offset.min(shown)) {
        (all, part) if part < all => format!(" {} {}-{shown} of {all} ", pane.title(), offset + 1),
        (all, _) => format!(" {} {all} ", pane.title()),
    };
    let header = table.columns.iter().enumerate().map(|(index, column)| {
        let arrow = match (view.sort == Some(index), view.ascending) {
            (false, _) => "",
            (true, false) => "v",
            (true, true) => "^",
        };
        aligned(format!("{}{arrow}", column.title), column.right)
    });
    let grown = grown_width(area.width.saturating_sub(2), table);
    let rows = table.rows[offset..shown].iter().map(|row| {
        Row::new(row.iter().zip(table.columns).map(|(cell, column)| {
            let width = usize::from(if column.grows { grown } else { column.width });
            aligned(cell.text(width), column.right).style(style(cell))
        }))
    });
    let widths = table
        .columns
        .iter()
        .map(|column| Constraint::Length(if column.grows { grown } else { column.width }));
    let border = if focused { BorderType::Double } else { BorderType::Plain };
    let block = Block::bordered().border_type(border).title(title);
    let widget = TableWidget::new(rows, widths)
        .header(Row::new(header).style(Style::new().add_modifier(Modifier::BOLD)))
        .column_spacing(1)
        .block(block);
    frame.render_widget(widget, area);
}

fn aligned(text: String, right: bool) -> TableCell<'static> {
    TableCell::from(if right { Line::raw(text).right_aligned() } else { Line::raw(text) })
}

/// What the growing column gets of a line of this width.
fn grown_width(width: u16, table: &super::Table) -> u16 {
    let fixed: u16 = table.columns.iter().filter(|column| !column.grows).map(|column| column.width + 1).sum();
    let least = table.columns.iter().find(|column| column.grows).map_or(0, |column| column.width);
    width.saturating_sub(fixed).max(least)
}

/// Divides the lines among three panes: each its rows, a header and borders
/// where there is room; else the focus what it needs, up to half, the others
/// in turn.
fn heights(height: u16, rows: [usize; 3], focus: usize) -> [u16; 3] {
    let wanted = rows.map(|rows| u16::try_from(rows.max(1)).unwrap_or(u16::MAX).saturating_add(3));
    let total = wanted.iter().map(|wanted| u32::from(*wanted)).sum::<u32>();
    if total <= u32::from(height) {
        return wanted;
    }
    let mut given = [0; 3];
    let mut left = height;
    let others = [(focus + 1) % 3, (focus + 2) % 3];
    let quarter = height / 4;
    for other in others {
        given[other] = wanted[other].min(quarter);
        left -= given[other];
    }
    given[focus] = wanted[focus].min(left);
    left -= given[focus];
    for other in others {
        let more = (wanted[other] - given[other]).min(left);
        given[other] += more;
        left -= more;
    }
    given
}

fn style(cell: &Cell) -> Style {
    match cell {
        Cell::State(state) => match state.as_str() {
            "ready" | "up" => Style::new().fg(Color::Green),
            "down" | "hung" => alarm(),
            _ => Style::new().fg(Color::Yellow),
        },
        Cell::Bars(_) => Style::new().fg(Color::Cyan),
        _ => Style::new(),
    }
}

fn alarm() -> Style {
    Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
}

fn help(frame: &mut Frame) {
    let lines: Vec<Line> =
        HELP.iter().map(|(keys, does)| Line::raw(format!(" {keys:<24} {does} "))).collect();
    let area = frame.area();
    let (width, height) = (area.width.min(70), area.height.min(lines.len() as u16 + 2));
    let middle =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, middle);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" Keys ")), middle);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panes_share_the_lines_and_never_take_more_than_there_are() {
        assert_eq!(heights(40, [2, 4, 3], 0), [5, 7, 6]);
        for height in 0..60 {
            for focus in 0..3 {
                let given = heights(height, [10, 16, 100], focus);
                assert!(given.iter().sum::<u16>() <= height, "{height}: {given:?}");
            }
        }
        assert_eq!(heights(40, [10, 16, 100], 2), [10, 10, 20]);
        assert_eq!(heights(40, [1, 2, 100], 0), [4, 5, 31]);
    }
}
