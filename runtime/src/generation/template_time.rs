//! Dates for chat templates: the `strftime_now` function of the field, without a time zone database.
//!
//! Times are UTC. Names of days and months are English.

/// Calendar parts of a moment given in seconds since 1970-01-01T00:00:00Z.
struct Calendar {
    year: i64,
    /// 1 to 12.
    month: usize,
    /// 1 to 31.
    day: i64,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: usize,
    second_of_day: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

impl Calendar {
    fn at(unix_seconds: u64) -> Self {
        let seconds = i64::try_from(unix_seconds).unwrap_or(i64::MAX).min(253_402_300_799); // 9999-12-31
        let days = seconds / 86_400;
        let weekday = ((days + 4) % 7) as usize; // 1970-01-01 was a Thursday
        let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
        while rest >= 365 + i64::from(is_leap(year)) {
            rest -= 365 + i64::from(is_leap(year));
            year += 1;
        }
        let day_of_year = rest + 1;
        let mut month = 0;
        let february = 28 + i64::from(is_leap(year));
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if rest < length {
                break;
            }
            rest -= length;
            month += 1;
        }
        let second_of_day = seconds % 86_400;
        Calendar { year, month: month + 1, day: rest + 1, day_of_year, weekday, second_of_day }
    }
}

/// `unix_seconds` written as the C function `strftime` does. `Err` names a directive that is not known.
pub(super) fn strftime(format: &str, unix_seconds: u64) -> Result<String, String> {
    let at = Calendar::at(unix_seconds);
    let (hour, minute, second) = (at.second_of_day / 3600, at.second_of_day / 60 % 60, at.second_of_day % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let (month, day) = (MONTHS[at.month - 1], DAYS[at.weekday]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        let (directive, padded) = match directive {
            Some('-') => (chars.next(), false),
            other => (other, true),
        };
        let two = |n: i64| if padded { format!("{n:02}") } else { n.to_string() };
        out += &match directive {
            Some('Y') => at.year.to_string(),
            Some('y') => two(at.year % 100),
            Some('m') => two(at.month as i64),
            Some('B') => month.to_owned(),
            Some('b' | 'h') => month[..3].to_owned(),
            Some('d') => two(at.day),
            Some('e') => format!("{:2}", at.day),
            Some('j') if padded => format!("{:03}", at.day_of_year),
            Some('j') => at.day_of_year.to_string(),
            Some('A') => day.to_owned(),
            Some('a') => day[..3].to_owned(),
            Some('w') => at.weekday.to_string(),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", at.year, at.month, at.day),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(format!("strftime directive %{other} is not known")),
            None => return Err("a strftime format ends in %".to_owned()),
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    /// Expectations from the `date -u -d @SECONDS` command.
    #[test]
    fn known_moments() {
        let full = "%a %A %d %b %B %Y %y %m %j %H:%M:%S %I %p";
        let at = |seconds| strftime(full, seconds).unwrap();
        assert_eq!(at(0), "Thu Thursday 01 Jan January 1970 70 01 001 00:00:00 12 AM");
        assert_eq!(at(951_827_696), "Tue Tuesday 29 Feb February 2000 00 02 060 12:34:56 12 PM");
        assert_eq!(at(1_735_689_599), "Tue Tuesday 31 Dec December 2024 24 12 366 23:59:59 11 PM");
        assert_eq!(at(4_107_542_400), "Mon Monday 01 Mar March 2100 00 03 060 00:00:00 12 AM");
        assert_eq!(strftime("%-d/%-m %F %T %%", 86_400 * 3).unwrap(), "4/1 1970-01-04 00:00:00 %");
    }

    #[test]
    fn unknown_directives_are_errors() {
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("%", 0).is_err());
    }
}
