//! The `--shard-size` argument: bytes, or a number with a unit as `save_pretrained` takes it.

/// Parses `5GB`, `500MB`, `200KiB` or plain bytes; K, M and G are powers of 1000, Ki, Mi and Gi of 1024.
///
/// # Errors
/// A message for the command line.
pub fn parse_shard_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected bytes or a size such as 5GB, 500MB or 2GiB, found {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let factor = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(wrong()),
    };
    match number.checked_mul(factor) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        assert_eq!(parse_shard_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_shard_size("300"), Ok(300));
        assert_eq!(parse_shard_size("2MiB"), Ok(2 << 20));
        for wrong in ["", "GB", "0", "5TB", "-1", "1.5GB", "99999999999GiB"] {
            assert!(parse_shard_size(wrong).is_err(), "{wrong}");
        }
    }
}
