use super::*;

#[test]
fn outside_of_a_namespace_of_its_own_nothing_is_done() {
    assert!(matches!(enter("/tmp"), Err(JailError::NotIsolated)));
}

#[test]
fn inodes_and_handles_share_the_limit_of_open_files() {
    let (inodes, handles) = raise_file_limit(1000, 100).unwrap();
    assert_eq!((inodes, handles), (1000, 100));
    // More than any system allows: both get a part.
    let (inodes, handles) = raise_file_limit(u64::MAX, u64::MAX).unwrap();
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(inodes > 0 && handles > 0);
    assert!((inodes + 2 * handles) as u64 + OTHER_FILES <= soft);
}
