//! Elements chosen among equals: their part of each similarity, and what is left without them,
//! against sets, through the real binary.

use crate::common;
use std::collections::HashSet;
use std::path::Path;

use crate::common::{MODEL, Region, Setting, header, write_mask};
use cpift_core::Mask;
use cpift_core::format::flags::BitList;
use cpift_core::format::mask::{MaskWriter, Ties, indices};
use cpift_testkit::Numbers;

/// Replaces a mask by one in which the elements of `tied` are flagged.
fn flag(path: &Path, region: &Region, tied: &HashSet<usize>) {
    let n = region.iter().filter(|i| tied.contains(i)).count() as u64;
    let mut header = header(region.len());
    header.ties = Ties { at_threshold: 2 * n, chosen: n, decided_by_hash: n };
    std::fs::remove_file(path).unwrap();
    let writer = MaskWriter::create(path, &header).unwrap();
    let (mut start, mut flags) = (0, BitList::default());
    for (name, n) in &header.numel {
        let n = *n as usize;
        let mut bits = vec![0u8; n.div_ceil(8)];
        region.range(start..start + n).map(|i| i - start).for_each(|i| bits[i / 8] |= 1 << (i % 8));
        writer.write(name, 0, &bits).unwrap();
        indices(&bits).for_each(|i| flags.push(tied.contains(&(start + i))));
        start += n;
    }
    writer.write_flags(0, &flags.into_bytes()).unwrap();
    writer.finish(&header).unwrap();
    Mask::open(path).unwrap().verify().unwrap();
}

#[test]
fn what_rests_on_ties_and_what_is_left_equal_a_set_computation() {
    let mut numbers = Numbers(5);
    let total: usize = MODEL.iter().map(|(_, n)| n).sum();
    let mut random = |n: usize| (0..n).map(|_| (numbers.bits() as usize) % total).collect::<Region>();
    let regions = [("a", random(30_000)), ("b", random(20_000)), ("c", random(9_000))];
    let tied: Vec<HashSet<usize>> = vec![random(200_000).into_iter().collect(), random(20_000).into_iter().collect()];
    let s = Setting::new(&regions);
    for ((name, region), tied) in regions.iter().zip(&tied) {
        flag(&s.path(&format!("{name}.mask")), region, tied);
    }
    let none = HashSet::new();
    let head = MODEL[0].1 + MODEL[1].1;
    for (flags, range) in [(&[][..], 0..total), (&["--exclude", "norms,embeddings"][..], head..head + MODEL[2].1)] {
        let groups = s.groups(flags);
        let found = groups.without_ties.expect("two masks have ties");
        let sets = |without: bool| -> Vec<HashSet<usize>> {
            let of = |(i, (_, region)): (usize, &(&str, Region))| {
                let tied = tied.get(i).unwrap_or(&none);
                region.range(range.clone()).copied().filter(|at| !without || !tied.contains(at)).collect()
            };
            regions.iter().enumerate().map(of).collect()
        };
        let (all, left) = (sets(false), sets(true));
        for (a, b) in (0..3).flat_map(|a| (0..3).map(move |b| (a, b))) {
            let shared = |sets: &[HashSet<usize>]| sets[a].intersection(&sets[b]).count() as f64;
            assert_eq!(found.jaccard[a][b], shared(&left) / left[a].union(&left[b]).count() as f64, "{a} {b}");
            assert_eq!(found.tied[a][b], (shared(&all) - shared(&left)) / shared(&all), "{a} {b}");
            let q = |i: usize| left[i].len() as f64 / range.len() as f64;
            let chance = q(a) * q(b) / (q(a) + q(b) - q(a) * q(b));
            assert!((found.chance[a][b] - chance).abs() < 1e-15, "{a} {b}");
        }
        assert_eq!(found.tied[2][2], 0.0);
    }
    let bytes = ["1", "2", "3"].map(|threads| {
        s.run(&["--threads", threads, "--force"]).ok().says(&[
            "chosen among equals",
            "without them",
            "save probes in f32",
        ]);
        std::fs::read(s.out.join("groups.json")).unwrap()
    });
    assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2]);
}

#[test]
fn masks_without_ties_have_no_second_matrix() {
    let s = Setting::new(&[("a", common::every(0..1000, 3)), ("b", common::every(0..1000, 5))]);
    assert_eq!(s.groups(&[]).without_ties, None);
    let text = std::fs::read_to_string(s.out.join("groups.json")).unwrap();
    assert!(!text.contains("without_ties"));
}

#[test]
fn flags_that_do_not_fit_the_mask_are_refused() {
    let region = common::every(0..1000, 3);
    let s = Setting::new(&[("a", region.clone()), ("b", common::every(0..1000, 5))]);
    let path = s.path("a.mask");
    flag(&path, &region, &(0..500).collect());
    let good = std::fs::read(&path).unwrap();
    // The flags are the last bytes of the file.
    let mut bad = good.clone();
    *bad.last_mut().unwrap() |= 0x80;
    std::fs::write(&path, bad).unwrap();
    s.run(&[]).bad_input(&["a.mask", "cpift.ties"]);
    let mut header = header(region.len());
    header.ties.decided_by_hash = 0;
    std::fs::remove_file(&path).unwrap();
    write_mask(&path, &region, &header);
    s.run(&[]).ok();
}
