//! What is staged appears whole, or not at all.

use super::*;

#[test]
fn a_dropped_stage_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let staged = StagedDir::create(&dir.path().join("out"), false).unwrap();
    fs::write(staged.path().join("x"), "y").unwrap();
    drop(staged);
    drop(StagedFile::create(&dir.path().join("f"), false).unwrap());
    let staged = StagedPath::create(&dir.path().join("p"), false).unwrap();
    fs::write(staged.path(), "y").unwrap();
    drop(staged);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_existing_output_is_refused_and_force_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("stale"), "").unwrap();
    assert!(StagedDir::create(&out, false).is_err());
    assert!(StagedDir::create(&out, true).is_err(), "a folder that is not ours");
    assert!(out.join("stale").exists());
    fs::write(out.join("cpift.json"), "").unwrap();
    let staged = StagedDir::create(&out, true).unwrap();
    fs::write(staged.path().join("new"), "").unwrap();
    staged.commit().unwrap();
    assert!(out.join("new").exists() && !out.join("stale").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_staged_path_becomes_its_destination_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("p");
    let staged = StagedPath::create(&dest, false).unwrap();
    fs::write(staged.path(), "y").unwrap();
    staged.commit().unwrap();
    assert_eq!(fs::read_to_string(&dest).unwrap(), "y");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(StagedPath::create(&dest, false).is_err());
}

#[test]
fn outputs_get_the_modes_of_the_umask() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    write_text(&path, "x", false).unwrap();
    let plain = dir.path().join("plain");
    fs::write(&plain, "x").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions(), fs::metadata(&plain).unwrap().permissions());
}

#[test]
fn folders_made_for_an_output_stay_only_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("a/b/out");
    drop(StagedDir::create(&dest, false).unwrap());
    assert!(!dir.path().join("a").exists());
    StagedDir::create(&dest, false).unwrap().commit().unwrap();
    assert!(dest.is_dir());
}

#[test]
fn what_is_staged_goes_by_its_final_name_in_messages() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("a.b");
    let folder = StagedDir::create(&dest, false).unwrap();
    assert_eq!(final_name(&folder.path().join("x.safetensors")), dest.join("x.safetensors"));
    drop(folder);
    let file = StagedPath::create(&dest, false).unwrap();
    assert_eq!(final_name(&file.path()), dest);
    assert_eq!(final_name(Path::new("/m/.a.partial/x")), Path::new("/m/.a.partial/x"));
}

#[test]
fn what_a_dead_run_left_is_removed_and_a_living_one_is_let_be() {
    let dir = tempfile::tempdir().unwrap();
    let dead = dir.path().join(".out.abc123.partial");
    let other = dir.path().join(".out.more.abc123.partial");
    for folder in [&dead, &other] {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("new"), "half").unwrap();
    }
    let first = StagedDir::create(&dir.path().join("out"), false).unwrap();
    assert!(!dead.exists() && other.exists());
    for force in [false, true] {
        let error = StagedDir::create(&dir.path().join("out"), force).err().expect("one is at work").to_string();
        assert!(error.contains("another run is writing this output"), "{error}");
    }
    assert!(first.path().exists());
}

#[test]
fn what_another_run_has_written_meanwhile_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (file, folder) = (dir.path().join("f"), dir.path().join("d"));
    let staged = StagedFile::of_text(&file, "mine", false).unwrap();
    let staged_dir = StagedDir::create(&folder, false).unwrap();
    fs::write(&file, "theirs").unwrap();
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("theirs"), "").unwrap();
    for error in [staged.commit(), staged_dir.commit()].map(|done| done.unwrap_err().to_string()) {
        assert!(error.contains("another run has written this output meanwhile"), "{error}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "theirs");
    assert!(folder.join("theirs").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn links_under_the_final_name_are_replaced_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("elsewhere");
    fs::create_dir(&target).unwrap();
    for name in ["precious", crate::files::naming::RECORD_NAME] {
        fs::write(target.join(name), "old").unwrap();
    }
    let (file, folder) = (dir.path().join("f"), dir.path().join("d"));
    std::os::unix::fs::symlink(target.join("precious"), &file).unwrap();
    std::os::unix::fs::symlink(&target, &folder).unwrap();
    assert!(write_text(&file, "new", false).is_err() && StagedDir::create(&folder, false).is_err());
    write_text(&file, "new", true).unwrap();
    StagedDir::create(&folder, true).unwrap().commit().unwrap();
    assert!(!file.is_symlink() && !folder.is_symlink());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 2);
    assert_eq!(fs::read_to_string(target.join("precious")).unwrap(), "old");
}
