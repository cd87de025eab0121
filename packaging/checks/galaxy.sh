# Galaxy's tools, the data manager and both repositories, by planemo's linters. Without the tool shed, planemo shed_lint cannot compare versions.
# pip: planemo==0.75.47
for repository in virnucpro data_manager_virnucpro; do
    planemo lint --recursive --fail_level warn "packaging/galaxy/$repository"
    planemo shed_lint --tools --fail_level warn --skip version_bumped "packaging/galaxy/$repository"
done
